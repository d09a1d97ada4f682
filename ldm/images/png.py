"""PNG files that carry their own request. They appear complete or not at all.

A PNG gets two text chunks: `parameters`, in the form that other tools read, and `ldm`, the whole `Request`
as JSON, from which the picture can be drawn again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.files import reason, temporary_file, write_errors
from ldm.images.parameters import format_parameters, parse_parameters
from ldm.request import Request

CHUNK = "ldm"


def save_png(image: Image.Image, path: Path, request: Request | None = None) -> Path:
    """Write `path`, replacing what is there, with the request in its text chunks. Raises UserError."""
    with write_errors(path), _complete_file(image, path, request) as temporary:
        temporary.replace(path)
    return path


def save_numbered(image: Image.Image, folder: Path, name: str, request: Request | None = None) -> Path:
    """Write the first free of `name % 0`, `name % 1`, ... after the highest in `folder`, never over another.

    Several processes may write to one folder: each number goes to one of them. Raises UserError.
    """
    with write_errors(folder), _complete_file(image, folder / name, request) as temporary:
        number = _next_number(folder, name)
        while not _rename_new(temporary, folder / (name % number)):
            number += 1
    return folder / (name % number)


def read_request(path: str | Path) -> Request:
    """The request of a picture: our own chunk, else the `parameters` text. Raises UserError."""
    chunks = _text_chunks(Path(path))
    if CHUNK in chunks:
        return Request.from_json(chunks[CHUNK])
    if "parameters" in chunks:
        return parse_parameters(chunks["parameters"])
    raise UserError(f"{path} does not say how it was drawn: it has no '{CHUNK}' or 'parameters' text chunk")


def _text_chunks(path: Path) -> dict[str, str]:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read {path} as a PNG picture: {reason(error)}") from None


@contextlib.contextmanager
def _complete_file(image: Image.Image, path: Path, request: Request | None) -> Iterator[Path]:
    """A finished PNG under a temporary name beside `path`; whatever happens, no such name stays."""
    chunks = PngInfo()
    if request is not None:
        chunks.add_text("parameters", format_parameters(request))
        chunks.add_text(CHUNK, request.to_json())
    with temporary_file(path) as temporary:
        with temporary.open("wb") as file:
            image.save(file, format="PNG", pnginfo=chunks)
        yield temporary


def _next_number(folder: Path, name: str) -> int:
    shape = re.compile(re.sub(r"%0\d+d", r"(\\d+)", re.escape(name).replace(r"\%", "%")))
    found = (shape.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _rename_new(temporary: Path, path: Path) -> bool:
    """Give the file its name unless that is taken; True if it was free."""
    link: Callable[[Path, Path], None] = os.link  # unlike rename, it refuses an existing name
    try:
        link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True
