"""The page of an evaluation: the table, shares with their intervals, histograms, best and worst pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from ldm.evaluate import page
from ldm.evaluate.chart import Bar, histogram, shares
from ldm.evaluate.figures import Found, notes
from ldm.images.opening import open_picture

SHOWN = 8  # best pictures, and as many worst ones
SMALL = 192  # pixels of their longer side


def write_overview(path: Path, title: str, found: Found, folders: Mapping[str, Path]) -> Path:
    """Write the page, all of it or nothing. Returns its path.

    Args:
        folders: where the pictures of each of `found.per_picture` lie.

    Raises:
        UserError: if it cannot be written, or a picture has gone.
    """
    sections = [_table(found), *_lines("Worth knowing", notes(found)), *_shares(found)]
    for name, values in found.per_picture.items():
        sections += _of_pictures(name, values, folders[name])
    left_out = [f"{name}: {why}" for name, why in found.left_out.items()]
    sections += [*_lines("Left out", left_out), "<h2>Protocol</h2>", page.facts(_flat(found.protocol))]
    return page.write_page(path, title, sections)


def _table(found: Found) -> str:
    rows = ["<tr><th></th><th></th><th>interval</th><th>which</th><th>better</th><th>pictures</th></tr>"]
    for figure in found.figures:
        cells = (f"{figure.value:.4g}", figure.interval, figure.spread, figure.better, figure.counted)
        rows.append(
            f"<tr><th>{escape(figure.name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        )
    return f"<table>{''.join(rows)}</table>" if found.figures else "<p>Nothing could be measured.</p>"


def _lines(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _shares(found: Found) -> Iterator[str]:
    """Those figures that have a Wilson interval."""
    bars = [
        Bar(escape(figure.name), figure.value, figure.low, figure.high)
        for figure in found.figures
        if "Wilson" in figure.spread and figure.low is not None and figure.high is not None
    ]
    if bars:
        chart = shares(bars, "Shares with their 95 % intervals")
        yield f'<h2>Shares</h2><div class="pair"><figure>{chart}</figure></div>'


def _of_pictures(name: str, values: Mapping[str, float], folder: Path) -> Iterator[str]:
    """How a figure spreads over the pictures, and the pictures at its ends."""
    label = escape(name)
    chart = histogram(list(values.values()), label, f"{label}: how many pictures")
    what = "<figcaption>How many pictures have which value; the mean is dashed</figcaption>"
    yield f'<h2>{label}</h2><div class="pair"><figure>{what}{chart}</figure></div>'
    order = sorted(values, key=lambda picture: (values[picture], picture))
    shown = min(SHOWN, len(order) // 2)
    ends = {"Lowest": order[:shown], "Highest": order[::-1][:shown]} if shown else {"All": order}
    for title, names in ends.items():
        figures = "".join(_picture(folder / each, f"{values[each]:.4g}  {each}") for each in names)
        yield f'<p><b>{title}</b></p><div class="between">{figures}</div>'


def _picture(path: Path, caption: str) -> str:
    shown = page.picture(page.jpeg(open_picture(path), SMALL), "jpeg", path.name)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{shown}</figure>"


def _flat(protocol: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    for name, value in protocol.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}, ")
        else:
            yield f"{above}{name}", "; ".join(map(str, value)) if isinstance(value, list) else value
