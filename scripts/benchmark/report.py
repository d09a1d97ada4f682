"""The report: a page in Markdown with tables, all figures as JSON, and a picture of the ratios."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.case import ROWS
from benchmark.results import Line, Measured, Results, lines

ROOT = Path(__file__).parents[2]
# Charts stand alone as files: a page's colours do not reach into them.
PAPER = '<svg style="background:#fff;color:#24292f" '


def write_report(folder: Path, name: str, told: Mapping[str, Any], results: Sequence[Results]) -> Path:
    """Write `name`.md, `name`.json and `name`-MODEL.svg.

    Args:
        told: "command", "rounds", and what `environment.describe` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = _told({**told, "models": [asdict(each) for each in results]})
    # Where this checkout lies is nobody's business.
    text = json.dumps(everything, indent=1).replace(f"{ROOT}/", "") + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    charts = {}
    for each in results:
        drawn = chart(each)
        if drawn:
            charts[each.case.model] = file = f"{name}-{each.case.model}.svg"
            (folder / file).write_text(drawn, encoding="utf-8")
    page = folder / f"{name}.md"
    page.write_text("\n".join(_page(told, results, charts)) + "\n", encoding="utf-8")
    return page


def _told(value: Any) -> Any:
    """The same with null for what is not told, as JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _told(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_told(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _page(told: Mapping[str, Any], results: Sequence[Results], charts: Mapping[str, str]) -> Iterator[str]:
    processor = told["processor"]
    units = ", ".join(processor["units"]) or "not told"
    yield f"# Benchmark of {told['date']}\n"
    yield f"- `{told['command']}`"
    yield f"- {processor['cores']} cores of {processor['name']}; units: {units}; {told['memory_gib']} GiB"
    if told.get("graphics_card"):
        yield f"- {told['graphics_card']}"
    yield f"- {', '.join(f'{name} {version}' for name, version in told['versions'].items())}"
    loads = [told.get(f"load_average_{when}") for when in ("before", "after")]
    if None not in loads:
        yield f"- processes that wanted a core: {loads[0]:.1f} at the start, {loads[1]:.1f} at the end"
    yield f"- medians of {told['rounds']} rounds; how to read this: [README.md](README.md)"
    for each in results:
        yield from _model(each, charts.get(each.case.model))


def _model(results: Results, chart: str | None) -> Iterator[str]:
    case = results.case
    yield f"\n## {case.model}: {case.width} x {case.height}, {case.steps} steps\n"
    if chart:
        yield f"![ours / theirs by row and peer]({chart})\n"
    yield "| row | peer | median | least to most | ours / it | error | first call |"
    yield "|---|---|---|---|---|---|---|"
    for row in dict.fromkeys(each.row for each in results.measured):
        yield from table_lines(results.of(row))
    if results.reference:
        yield f"\nErrors are relative to {results.reference}."
    for peer, seconds in results.made_s.items():
        yield f"\nMade once before, in no figure above: {peer}'s networks, {seconds:.0f} s."


def table_lines(measured: Sequence[Measured]) -> Iterator[str]:
    """The table of one row: its figures by peer, then those peers that could not run."""
    by_peer = {each.peer: each for each in measured}
    first = next(iter(ROWS[measured[0].row].figures))
    title = ROWS[measured[0].row].figures[first].title
    before = ""  # each title once, where it begins
    for line in lines(measured):
        peer = by_peer[line.peer]
        is_first = line.figure == first
        error = _error(peer.error) if is_first else ""
        call = f"{peer.first_s:.1f} s" if is_first and peer.first_s is not None else ""
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        spread = f"{number(line.least)} to {number(line.most)}"
        shown, before = line.title if line.title != before else "", line.title
        cells = (shown, line.peer, f"{number(line.median)} {line.unit}", spread, ratio, error, call)
        yield f"| {' | '.join(cells)} |"
    for each in measured:
        if each.failed:
            yield f"| {title} | {each.peer} | {each.failed.replace('|', '/')} | | | | |"


def _error(error: float | None) -> str:
    if error is None:
        return ""
    return "another shape" if math.isnan(error) else f"{error:.1e}"


def number(value: float) -> str:
    """Three digits, more where they are before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def chart(results: Results) -> str:
    """A bar for each ratio of a row's first figure, SVG; "" where there are none."""
    from ldm.evaluate.chart import Bar, ratios

    drawn = []
    for row in dict.fromkeys(each.row for each in results.measured):
        first = next(iter(ROWS[row].figures))
        found: list[Line] = [line for line in lines(results.of(row)) if line.figure == first]
        drawn += [
            Bar(f"{row}: {line.peer}", line.ratio, line.ratio_least or 0, line.ratio_most or 0)
            for line in found
            if line.ratio is not None
        ]
    if not drawn:
        return ""
    label = f"ours / theirs on {results.case.model}: below 1 ours is the quicker"
    return ratios(drawn, label).replace("<svg ", PAPER, 1)
