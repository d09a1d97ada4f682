"""One HTML page that holds all it shows: nothing is fetched, nothing runs, and a policy says so."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from ldm.files import whole_file


def write_page(path: Path, title: str, sections: Sequence[str]) -> Path:
    """Write a page under a heading, all of it or nothing. Returns its path.

    Args:
        title: text.
        sections: HTML.

    Raises:
        UserError: if it cannot be written.
    """
    body = "\n".join([f"<h1>{escape(title)}</h1>", *sections])
    with whole_file(path) as aside:  # names of files may be no Unicode
        aside.write_text(PAGE.substitute(title=escape(title), body=body), encoding="utf-8", errors="replace")
    return path


def facts(rows: Iterable[tuple[object, object]]) -> str:
    """Names and values, as a table of two columns."""
    cells = (f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def picture(data: bytes, kind: str, alt: str) -> str:
    """A picture by its file's bytes. kind: "png" or "jpeg"."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


def jpeg(image: Image.Image, longest: int) -> bytes:
    """A JPEG of it, its longer side at most `longest` pixels."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((longest, longest))
    small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1.5rem 0.2rem 0; overflow-wrap: anywhere; }
th { font-weight: 600; }
.pair, .between { display: grid; gap: 1.5rem; margin-top: 1.5rem; }
.pair { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.between { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
figure { margin: 0; break-inside: avoid; }
img, svg { display: block; width: 100%; height: auto; margin-top: 0.3rem; }
@media print { :root { color-scheme: light; } body { margin: 0; max-width: none; font-size: 11pt; } }
</style>
</head>
<body>
$body
</body>
</html>
""")
