"""The report at the end of a run: one page, `report.html`, that holds all it shows.

metrics.jsonl -> curves as SVG;  grids/<step>.png -> pictures before, on the way and after
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluate import page
from ldm.evaluate.chart import Point, chart
from ldm.images.opening import open_picture

PLACE = ("step", "samples", "minutes", "skipped")  # of a row: where it stands, and nothing to draw
LABELS = {
    "loss": "Loss",
    "held_out_loss": "Held-out loss",
    "prior_loss": "Loss on pictures of the class",
    "grad_norm": "Gradient norm",
    "samples_per_s": "Speed, images/s",
    "memory_gb": "Memory, GiB",
}
MOST_BETWEEN = 6  # grids between the first and the last
SMALL = 480  # pixels of their longer side


def write_report(
    run_dir: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    prompts: Sequence[str],
    outputs: Sequence[tuple[Path, str]],
) -> Path:
    """Write run_dir/report.html, all of it or nothing, from the run's metrics and grids. Returns its path.

    Args:
        facts: what was trained and how, by name.
        prompts: of the rows of each grid, from the top.
        outputs: what the run has made, and how each is used.

    Raises:
        UserError: if it cannot be written.
    """
    rows = read_metrics(run_dir / "metrics.jsonl")
    sections = [
        page.facts([*facts.items(), *_totals(rows)]),
        "<h2>Pictures</h2>",
        *_pictures(run_dir, prompts),
        "<h2>Curves</h2>",
        *_curves(rows),
        "<h2>Files</h2>",
        page.facts(outputs) if outputs else "<p>None were written.</p>",
    ]
    return page.write_page(run_dir / "report.html", title, sections)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without those that are cut short; none where there is no such file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _totals(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """How far the run went: all of it grows, so the largest is the last."""
    names = {"step": "steps", "samples": "pictures shown", "minutes": "minutes", "skipped": "skipped steps"}
    for key, name in names.items():
        if values := [row[key] for row in rows if _is_number(row.get(key))]:
            yield name, f"{max(values):,.1f}" if key == "minutes" else f"{max(values):,}"


# --- pictures --------------------------------------------------------------------------------------------


def _pictures(run_dir: Path, prompts: Sequence[str]) -> Iterator[str]:
    """The grids: the first and the last as they are, and some from between, small."""
    named = (path for path in (run_dir / "grids").glob("*.png") if re.fullmatch(r"\d{8}", path.stem))
    grids = sorted(named, key=lambda path: path.stem)
    if not grids:
        yield "<p>None were drawn.</p>"
        return
    if prompts:
        listed = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
        yield f"<p>Each prompt has its row, from the top:</p><ol>{listed}</ol>"
    first = "" if int(grids[0].stem) else "Before: "
    ends = {grids[0]: first, **dict.fromkeys(grids[1:][-1:], "After: ")}
    yield f'<div class="pair">{"".join(_picture(path, name) for path, name in ends.items())}</div>'
    if between := _evenly(grids[1:-1], MOST_BETWEEN):
        yield f'<div class="between">{"".join(_picture(path, small=True) for path in between)}</div>'


def _evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of them."""
    shown = min(len(paths), most)
    return [paths[(2 * i + 1) * len(paths) // (2 * shown)] for i in range(shown)]


def _picture(path: Path, name: str = "", small: bool = False) -> str:
    """The file's own bytes or, small, a JPEG of it."""
    caption = f"<figcaption>{name}step {int(path.stem)}</figcaption>"
    try:
        kind, data = ("jpeg", page.jpeg(open_picture(path), SMALL)) if small else ("png", path.read_bytes())
    except UserError as error:
        return f"<figure>{caption}{escape(str(error))}</figure>"
    return f"<figure>{caption}{page.picture(data, kind, f'Pictures of step {int(path.stem)}')}</figure>"


# --- curves ----------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of all that rows hold: the loss, what was held out, and what else was logged, in that order."""
    trained = [row for row in rows if "samples_per_s" in row]
    held_out = [row for row in rows if "samples_per_s" not in row]
    figures = {name: _figure(name, points, dots=False) for name, points in _series(trained)}
    validated = {name: _figure(name, points, dots=True) for name, points in _series(held_out)}
    loss = [figures.pop("loss")] if "loss" in figures else []
    shown = [*loss, *validated.values(), *figures.values()]
    yield f'<div class="pair">{"".join(shown)}</div>' if shown else "<p>Nothing was logged.</p>"


def _series(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Point]]]:
    for name in dict.fromkeys(name for row in rows for name in row if name not in PLACE):
        if points := [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]:
            yield name, points


def _figure(name: str, points: Sequence[Point], dots: bool) -> str:
    """A curve below its name and last value: dots for what is measured now and then, else smoothed."""
    step, value = points[-1]
    values = f"{value:.5g} at step {step:.10g}"
    if dots:
        best, lowest = min(points, key=lambda point: point[1])
        values += f", lowest {lowest:.5g} at step {best:.10g}"
    label = escape(LABELS.get(name, name.replace("_", " ")))
    return f"<figure><figcaption><b>{label}</b> {values}</figcaption>{chart(points, dots, label)}</figure>"
