"""What is drawn with what: batches, and the pieces that workers share. It follows from the table alone.

So whoever draws a row, and when, draws it in the same batch: a picture is the same to the last bit, although
sums in a network are rounded by how many rows it sees. What is done already changes nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldm.bulk.rows import Row, Rows
from ldm.errors import UserError

Batch = tuple[int, ...]  # numbers of rows


@dataclass(frozen=True)
class Piece:
    """What one worker draws from beginning to end: a batch, or the batches of a shard."""

    number: int
    batches: tuple[Batch, ...]

    @property
    def rows(self) -> Batch:
        return tuple(i for batch in self.batches for i in batch)


@dataclass(frozen=True)
class Plan:
    """The pieces of a run.

    Attributes:
        batch: rows that are drawn together at most.
        shard: rows of a shard at most; None: each picture is a file of its own.
    """

    rows: Rows
    batch: int
    shard: int | None
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, rows: Rows, batch: int, shard: int | None = None) -> Plan:
        """Rows of a batch differ in texts and seeds only; batches of one model are neighbours.

        Shards have whole batches, so that pictures are the same with them and without.
        """
        models = {model: k for k, model in enumerate(dict.fromkeys(rows.models))}
        order = sorted(range(len(rows)), key=lambda i: models[rows.models[rows.kinds[i]]])
        parts = filled(cut(rows, order, batch), shard or 1)
        return cls(rows, batch, shard, tuple(Piece(k, part) for k, part in enumerate(parts)))

    def share(self, rank: int, world: int) -> tuple[Piece, ...]:
        """The pieces of one of `world` workers."""
        return self.pieces[rank::world]

    def left(self, pieces: Iterable[Piece], done: Container[str]) -> list[Piece]:
        """The pieces of which a row is not done, by its id."""
        ids = self.rows.ids
        return [piece for piece in pieces if any(ids[i] not in done for i in piece.rows)]

    def rows_of(self, batch: Batch) -> list[Row]:
        return [self.rows[i] for i in batch]


def cut(rows: Rows, numbers: Sequence[int], size: int) -> Iterator[Batch]:
    """Batches of rows of one kind each, kinds in the order in which they first come."""
    alike: dict[int, list[int]] = {}
    for i in numbers:
        alike.setdefault(rows.kinds[i], []).append(i)
    for group in alike.values():
        yield from (tuple(group[k : k + size]) for k in range(0, len(group), size))


def filled(batches: Iterable[Batch], most: int) -> Iterator[tuple[Batch, ...]]:
    """Neighbours that have at most so many rows together, or one batch."""
    part, count = list[Batch](), 0
    for batch in batches:
        if part and count + len(batch) > most:
            yield tuple(part)
            part, count = [], 0
        part.append(batch)
        count += len(batch)
    yield tuple(part)


# --- which worker this is -----------------------------------------------------------------------------------


def position(rank: int | None, world: int | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, world) as given; or as torchrun or Slurm says it, of tasks, of an array's jobs, or both.

    Raises UserError for one of the two alone, and for a rank that is none of them.
    """
    if (rank is None) != (world is None):
        raise UserError("--rank and --world go together: rank 0 of 4, and so on to rank 3 of 4")
    if rank is None or world is None:
        rank, world = found_position(environ)
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} is not allowed: it must be from 0 to {world - 1}, of {world}")
    return rank, world


def found_position(environ: Mapping[str, str]) -> tuple[int, int]:
    def number(name: str, default: int) -> int:
        value = environ.get(name, "")
        return int(value) if value.isdecimal() else default

    if "RANK" in environ and "WORLD_SIZE" in environ:
        return number("RANK", 0), number("WORLD_SIZE", 1)
    task, tasks = number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1)
    first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
    job, jobs = number("SLURM_ARRAY_TASK_ID", first), number("SLURM_ARRAY_TASK_COUNT", 1)
    return (job - first) // step * tasks + task, jobs * tasks
