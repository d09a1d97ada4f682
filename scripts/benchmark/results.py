"""What was measured, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmark.case import ROWS, Case


@dataclass
class Measured:
    """A row of a peer.

    threads: of torch in its process, where it has torch.
    rounds: the figures of each, in the order in which peers took turns. first_s: of the first call with all
    that it took to come there. error: of what was computed, relative to the reference's. failed: why there
    are no rounds, or no more of them.
    """

    row: str
    peer: str
    rounds: list[dict[str, float]] = field(default_factory=list)
    first_s: float | None = None
    error: float | None = None
    failed: str = ""
    threads: int | None = None

    def values(self, figure: str) -> list[float]:
        """Of each round that has it; NaN, which stands for what a system does not tell, left out."""
        found = [each[figure] for each in self.rounds if figure in each]
        return [value for value in found if not math.isnan(value)]


@dataclass
class Results:
    """Of one case.

    made_s: by peer, seconds that its conversions took, once. reference: the peer whose output errors are of.
    """

    case: Case
    measured: list[Measured] = field(default_factory=list)
    made_s: dict[str, float] = field(default_factory=dict)
    reference: str = ""

    def of(self, row: str) -> list[Measured]:
        return [each for each in self.measured if each.row == row]


@dataclass(frozen=True)
class Line:
    """A line of the table: a figure of a peer.

    ratio: of ldm's figure to its own, over rounds; None for ldm itself.
    """

    row: str
    figure: str
    title: str
    unit: str
    peer: str
    median: float
    least: float
    most: float
    ratio: float | None
    ratio_least: float | None
    ratio_most: float | None


def lines(measured: Sequence[Measured]) -> list[Line]:
    """All figures of one row, figure by figure. The base is the first of ldm's with rounds.

    A ratio is the median of those of single rounds, in which both took their turn one after the other, so
    that a machine which slows down in between does not change it. Below 1 ldm is the quicker, or smaller.
    """
    base = next((each for each in measured if each.peer.startswith("ldm-") and each.rounds), None)
    found = []
    for name, figure in ROWS[measured[0].row].figures.items() if measured else ():
        for each in measured:
            values = each.values(name)
            if not values:
                continue
            ratios = [] if base is None or each is base else paired(base.values(name), values)
            spread = (median(ratios), min(ratios), max(ratios)) if ratios else (None, None, None)
            size = median(values), min(values), max(values)
            found.append(Line(each.row, name, figure.title, figure.unit, each.peer, *size, *spread))
    return found


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios of rounds; of the medians where one has fewer rounds, or a value is 0."""
    if len(ours) != len(theirs):
        ours, theirs = [median(ours)] if ours else [], [median(theirs)]
    return [a / b for a, b in zip(ours, theirs, strict=False) if b > 0]
