"""Figures with what they rest on, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ldm.evaluate.report import Rate
from ldm.files import whole_file

RESAMPLES = 2000  # of a bootstrap


@dataclass(frozen=True)
class Figure:
    """One number. counts: of which pictures. low, high: its interval, and `spread` says which."""

    name: str
    value: float
    better: Literal["lower", "higher"]
    counts: Mapping[str, int]
    low: float | None = None
    high: float | None = None
    spread: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.value, self.low, self.high) if x is not None):
            raise FloatingPointError(f"{self.name} is NaN or infinite")

    @property
    def interval(self) -> str:
        return "" if self.low is None or self.high is None else f"[{self.low:.4g}, {self.high:.4g}]"

    @property
    def counted(self) -> str:
        return ", ".join(f"{n} {what}" for what, n in self.counts.items())


@dataclass(frozen=True)
class Found:
    """What was measured, what was not and why, and by which protocol.

    per_picture: figure -> picture -> its value.
    """

    figures: tuple[Figure, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    per_picture: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    protocol: Mapping[str, object] = field(default_factory=dict)


def merge(parts: Iterable[Found]) -> Found:
    """All of them, in their order."""
    figures: list[Figure] = []
    left_out: dict[str, str] = {}
    per_picture: dict[str, Mapping[str, float]] = {}
    protocol: dict[str, object] = {}
    for part in parts:
        figures += part.figures
        left_out |= part.left_out
        per_picture |= part.per_picture
        protocol |= part.protocol
    return Found(tuple(figures), left_out, per_picture, protocol)


def mean_figure(name: str, values: Mapping[str, float], counted: str, seed: int) -> Figure:
    """The mean over pictures, of which more is better, with the 95 % interval of a bootstrap.

    The percentile interval of means of resampled pictures (Efron and Tibshirani 1993, section 13.3).
    """
    x = np.fromiter(values.values(), np.float64, len(values))
    rng = np.random.default_rng(seed)
    means = [x[rng.integers(0, len(x), len(x))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    spread = f"95 % bootstrap over pictures, {RESAMPLES} resamples"
    return Figure(name, float(x.mean()), "higher", {counted: len(x)}, float(low), float(high), spread)


def rate_figure(name: str, rate: Rate, counts: Mapping[str, int], notes: Sequence[str] = ()) -> Figure:
    """A share, with its Wilson interval."""
    return Figure(
        name, rate.share, "higher", counts, rate.low, rate.high, "95 % Wilson interval", tuple(notes)
    )


# --- told ------------------------------------------------------------------------------------------------


def table(found: Found) -> Iterator[str]:
    """Lines for a terminal: a row for each figure, then notes and what was left out."""
    rows = [("", "", "interval", "better", "pictures")]
    rows += [(f.name, f"{f.value:.4g}", f.interval, f.better, f.counted) for f in found.figures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if found.figures:
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from (f"note: {line}" for line in notes(found))
    yield from (f"left out: {name}: {why}" for name, why in found.left_out.items())


def notes(found: Found) -> list[str]:
    """What to know of the figures, each once."""
    pairs: dict[str, list[str]] = {}
    for figure in found.figures:
        for note in figure.notes:
            pairs.setdefault(note, []).append(figure.name)
    return [f"{', '.join(names)}: {note}" for note, names in pairs.items()]


def write_json(path: Path, found: Found) -> None:
    """All of it, without NaN, whole or not at all. Raises UserError where it cannot be written."""
    value = {
        "figures": {figure.name: asdict(figure) for figure in found.figures},
        "left_out": found.left_out,
        "protocol": found.protocol,
        "per_picture": found.per_picture,
    }
    text = json.dumps(value, indent=2, allow_nan=False)
    with whole_file(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
