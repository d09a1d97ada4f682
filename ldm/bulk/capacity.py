"""From what one process was measured to take to what many would: a table and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.bulk.on_ray import BLOCKS
from ldm.bulk.simulation import Deaths, Fleet, Outcome, Store, simulate
from ldm.errors import UserError, printable, reason

Point = tuple[float, float]

HOUR = 3600.0
NODE = 8  # ranks of one machine, which torchrun starts anew where one has died


@dataclass(frozen=True)
class Measured:
    """Of one process, in seconds.

    what: the model, the steps and the machine, for people. batch: pictures of a batch. service: drawing, of
    each batch. start: from the command to the first batch. write: saving one picture, of each. dispatch:
    what Ray Data adds to a batch.
    """

    what: str
    batch: int
    service: tuple[float, ...]
    start: float
    write: tuple[float, ...]
    dispatch: float


@dataclass(frozen=True)
class Assumed:
    """What one machine cannot tell, in seconds.

    life: of a process, the mean. replaced: until another begins. slow: the share of workers that take
    `slowness` times as long. apart: between two workers' begins. noting: of drawing, between a rank's notes.
    latency: what the store adds to a write. connections: writes of a worker at once. rate: writes a
    second that the store takes.
    """

    life: float = 24 * HOUR
    replaced: float = 120.0
    slow: float = 0.02
    slowness: float = 2.0
    apart: float = 0.05
    noting: float = 30.0
    latency: float = 0.05
    connections: int = 8
    rate: float = 3500.0


@dataclass(frozen=True)
class Way:
    """An engine: do workers take from one queue, does it take time for a batch, and how many ranks die
    together."""

    shared: bool
    together: int

    def fleet(self, workers: int, batches: int, measured: Measured, assumed: Assumed) -> Fleet:
        store = Store(
            tuple(time + assumed.latency for time in measured.write), assumed.connections, assumed.rate
        )
        mean = sum(measured.service) / len(measured.service)
        noted = max(1, round(assumed.noting / mean))
        return Fleet(
            workers,
            measured.service,
            writes=measured.batch,
            slow=assumed.slow,
            slowness=assumed.slowness,
            start=measured.start,
            apart=assumed.apart,
            part=-(-batches // (BLOCKS * workers)) if self.shared else noted,
            shared=self.shared,
            dispatch=measured.dispatch if self.shared else 0.0,
            store=store,
            deaths=Deaths(assumed.life, assumed.replaced, self.together),
        )


WAYS = {
    "Ray Data": Way(shared=True, together=1),
    "Slurm array": Way(shared=False, together=1),
    f"torchrun, {NODE} a node": Way(shared=False, together=NODE),
}
HEADER = """| workers | engine | pictures/s | of perfect | hours | drawn in vain | deaths |
|--:|---|--:|--:|--:|--:|--:|"""


def read_measured(path: Path) -> Measured:
    """The JSON that `scripts/measure_bulk.py` writes. Raises UserError."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Measured).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {reason(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{printable(path)}: {where}: {printable(first['msg'])}") from None


def pictures_per_second(outcome: Outcome, measured: Measured) -> float:
    return outcome.throughput * measured.batch


def share_of_perfect(outcome: Outcome, measured: Measured) -> float:
    """The speed beside that of drawing alone, without anything else, on as many workers."""
    mean = sum(measured.service) / len(measured.service)
    return outcome.throughput * mean / outcome.workers


def row(name: str, outcome: Outcome, measured: Measured) -> str:
    """A line of the table."""
    told = (
        f"{pictures_per_second(outcome, measured):.3g}",
        f"{share_of_perfect(outcome, measured):.0%}",
        f"{outcome.seconds / HOUR:.3g}",
        f"{outcome.waste:.2%}",
    )
    return f"| {outcome.workers} | {name} | {' | '.join(told)} | {outcome.deaths} |"


def sweep(
    pictures: int, workers: Sequence[int], measured: Measured, assumed: Assumed, seed: int = 0
) -> dict[str, list[Outcome]]:
    """What comes of so many pictures, for each way, for each number of workers."""
    batches = -(-pictures // measured.batch)
    return {
        name: [simulate(way.fleet(n, batches, measured, assumed), batches, seed) for n in workers]
        for name, way in WAYS.items()
    }


def speeds(outcomes: Mapping[str, Sequence[Outcome]], measured: Measured) -> dict[str, list[Point]]:
    """Curves: pictures a second over workers."""
    return {
        name: [(float(each.workers), pictures_per_second(each, measured)) for each in line]
        for name, line in outcomes.items()
    }


def shares(outcomes: Mapping[str, Sequence[Outcome]], measured: Measured) -> dict[str, list[Point]]:
    """Curves: per cent of a perfect speed over workers."""
    return {
        name: [(float(each.workers), 100 * share_of_perfect(each, measured)) for each in line]
        for name, line in outcomes.items()
    }
