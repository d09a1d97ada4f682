"""What one process of bulk drawing takes, and when real workers ended: into the model, and beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm.bulk import on_ray
from ldm.bulk.capacity import Measured
from ldm.bulk.mapper import Drawn
from ldm.bulk.plan import Piece, Plan
from ldm.bulk.records import LOGS
from ldm.bulk.simulation import Fleet, simulate
from ldm.bulk.worker import Worker

THINGS = ("red sailboat", "green car", "yellow duck", "blue tent", "orange balloon", "white rocket")


def write_table(path: Path, rows: int, steps: int) -> None:
    """A table of so many rows, for the embedded model."""
    asked = ({"id": f"r{k}", "prompt": f"a {THINGS[k % 6]} at sea", "steps": steps} for k in range(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")


def measure(worker: Worker, what: str, start: float, clock: Callable[[], float]) -> Measured:
    """Draw and save all pieces of a worker's plan. The first, in which memory is found, does not count."""
    service, write = list[float](), list[float]()
    for piece in worker.plan.pieces:
        began = clock()
        results = list(worker.mapper(worker.plan.rows_of(piece.rows)))
        service.append(clock() - began)
        for result in results:
            began = clock()
            written = worker.encoded(result)
            assert isinstance(result, Drawn), result
            assert isinstance(written, tuple), written
            worker.storage.put(f"pictures/{result.row.id}{worker.encoding.suffix}", written[1])
            write.append(clock() - began)
    batch = len(worker.plan.pieces[0].rows)
    return Measured(what, batch, tuple(service[1:]), start, tuple(write[batch:]), 0.0)


class Idle:
    """A worker that draws nothing."""

    def __init__(self, pieces: int) -> None:
        self.plan = SimpleNamespace(pieces=range(pieces))

    def draw(self, _pieces: Sequence[Piece]) -> list[Any]:
        return []


def hired_idle(pieces: int, _name: str) -> Any:
    return nullcontext(Idle(pieces))


def dispatch(actors: int) -> float:
    """Seconds that Ray Data takes for a block: from the first to the last of many that draw nothing."""
    pieces = [Piece(number, ()) for number in range(on_ray.BLOCKS * actors)]
    ended = [
        time.perf_counter() for _ in on_ray.draw(partial(hired_idle, len(pieces)), pieces, (actors, actors))
    ]
    return (ended[-1] - ended[0]) / (len(ended) - 1)


def batch_times(out: Path, plan: Plan) -> list[list[float]]:
    """By log of a run into a folder: when each batch was noted, in seconds since 1970, sorted."""
    batch_of = {plan.rows.ids[i]: batch for piece in plan.pieces for batch in piece.batches for i in batch}
    found = list[list[float]]()
    for path in sorted((out / LOGS).glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found.append(sorted({batch_of[each["id"]]: each["time"] for each in records}.values()))
    return found


def checked(times: Sequence[Sequence[float]], began: float, shared: bool) -> tuple[float, list[float]]:
    """How long a run took from its begin to the last batch, and how long the model says, for 20 seeds.

    The model is given what the logs say: all times from one batch to the next, and of the first batches the
    mean time to them, less that of a batch.

    Args:
        times: by worker, of each batch, at least two.
    """
    service = [later - earlier for each in times for earlier, later in pairwise(each)]
    first = sum(each[0] - began for each in times) / len(times)
    start = max(0.0, first - sum(service) / len(service))
    fleet = Fleet(len(times), tuple(service), writes=0, start=start, shared=shared)
    batches = sum(map(len, times))
    return max(each[-1] for each in times) - began, [simulate(fleet, batches, k).seconds for k in range(20)]
