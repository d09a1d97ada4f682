"""Pieces of a plan drawn by actors of Ray Data: one for each device, as many as there are pieces for.

Ray hands out, starts actors where there is room for them, and starts those anew that die, with what they were
at. What is done, and that it is the same whoever does it, is not Ray's: each actor is a `Worker`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, printable, reason

if TYPE_CHECKING:
    from ldm.bulk.plan import Piece
    from ldm.bulk.worker import Worker

    Hire = Callable[[str], AbstractContextManager[Worker]]

BLOCKS = 50  # for each actor, of pieces: what Ray hands out, and what an actor's death costs


class Actor:
    """One worker, in a process of Ray's. It is hired with its first piece, so that errors have a way back."""

    def __init__(self, hire: Hire) -> None:
        self._hire, self._stack = hire, ExitStack()
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Draw the pieces of these numbers: how many rows were drawn, and failed, and what went wrong."""
        try:
            if self._worker is None:
                self._worker = self._stack.enter_context(self._hire(name()))
            worker = self._worker
            records = worker.draw([worker.plan.pieces[int(number)] for number in batch["piece"]])
        except UserError as error:
            return {"drawn": [0], "failed": [0], "error": [str(error)]}
        failed = sum(bool(record.error) for record in records)
        return {"drawn": [len(records) - failed], "failed": [failed], "error": [""]}


def name() -> str:
    """Of the actor that this process is, and of the one that replaces it."""
    from ray import get_runtime_context

    return f"ray-{get_runtime_context().get_actor_id()}"


def draw(hire: Hire, left: Sequence[Piece], workers: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Draw pieces; gives how many rows more were drawn, and failed.

    Args:
        hire: gives the worker of a name, as long as its process lives; it is sent to other machines.
        workers: how many at least and at most; they have a card each where there are cards.

    Raises:
        UserError: what an actor raised; if ray is not installed.
    """
    if not left:
        return
    with connected(workers[1]) as cards:
        from ray.data import ActorPoolStrategy, from_items

        # One block is drawn and one waits: an actor without work finds none that wait for another.
        pool = ActorPoolStrategy(min_size=workers[0], max_size=workers[1], max_tasks_in_flight_per_actor=2)
        numbers = [{"piece": piece.number} for piece in left]
        rows = from_items(numbers, override_num_blocks=min(len(left), BLOCKS * workers[1])).map_batches(
            Actor, batch_size=None, compute=pool, fn_constructor_args=(hire,), num_cpus=1, num_gpus=int(cards)
        )
        for row in rows.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield row["drawn"], row["failed"]


@contextmanager
def connected(workers: int) -> Iterator[bool]:
    """A cluster, which RAY_ADDRESS names, or this machine; whether it has cards. Raises UserError."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it tells of its own insides on stderr
    try:
        import ray
        from ray.data import DataContext
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray needs {error.name}: pip install 'ldm[ray]'") from None
    # On this machine: Ray counts processors, and waits for ever where it finds none free beside the actors.
    here: dict[str, Any] = {"address": "local", "num_cpus": max(os.cpu_count() or 1, workers + 2)}
    address = os.environ.get("RAY_ADDRESS")
    place = here | {"include_dashboard": False} if address is None else {"address": address}
    try:
        ray.init(**place, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # of many kinds, and of none
        raise UserError(f"no cluster of Ray: {printable(reason(error))}") from None
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        yield ray.cluster_resources().get("GPU", 0) > 0
    finally:
        ray.shutdown()
