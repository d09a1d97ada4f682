"""Shares with their intervals, and tables of them as Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.images.pixels import contact_sheet

NORMAL_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal


@dataclass(frozen=True)
class Rate:
    """`right` of `n`, with the 95 % Wilson interval."""

    right: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """right / n, NaN when nothing was counted."""
        return self.right / self.n if self.n else math.nan

    def __str__(self) -> str:
        return f"{self.share:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}" if self.n else "—"


def rate(outcomes: Iterable[bool]) -> Rate:
    """The share of outcomes that are true, with its Wilson score interval (Wilson 1927).

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). The interval of nothing is [0, 1].
    """
    seen = list(outcomes)
    n, right = len(seen), sum(seen)
    if not n:
        return Rate(0, 0, 0.0, 1.0)
    p, z = right / n, NORMAL_95
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Rate(right, n, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


Table = Mapping[str, Mapping[str, Rate]]  # column -> attribute -> rate


def markdown(table: Table, rows: Iterable[str]) -> str:
    """One row for each of `rows` that any column counted, one column for each of the table's."""
    lines = ["| | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
    for row in rows:
        cells = [column.get(row, rate([])) for column in table.values()]
        if any(cell.n for cell in cells):
            lines.append(f"| {row} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_json(path: Path, table: Table, facts: Mapping[str, object]) -> None:
    """The table and the facts of the run (model, steps, distances), readable by `json.load`."""
    rates = {
        column: {name: asdict(value) | {"share": value.share} for name, value in cells.items() if value.n}
        for column, cells in table.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "following": rates}, indent=2) + "\n", encoding="utf-8")


def write_pictures(
    folder: Path, groups: Mapping[str, NDArray[np.uint8]], columns: int = 8, rows: int = 8
) -> None:
    """Grids of all pictures, <group>-000.png and on, in the prompts' order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in groups.items():
        for page, start in enumerate(range(0, len(images), columns * rows)):
            part = [Image.fromarray(image) for image in images[start : start + columns * rows]]
            contact_sheet(part, columns).save(folder / f"{name}-{page:03d}.png")
