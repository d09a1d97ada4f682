"""What the processes of one run do together: all of it is nothing where there is only one."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ldm.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")

# How long a process waits for another that looks, saves or fills a cache. torch's own 10 minutes on a GPU are
# soon over; one that dies does not keep the others waiting, as torchrun ends them.
LONGEST_WAIT = timedelta(days=7)
SAME_SIGNAL_S = 2.0  # torchrun sends on the Ctrl-C that the terminal has sent already


def partial_state() -> PartialState:
    """The run's processes, which know each other from here on: a second call changes nothing."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # As Accelerator, which follows, does by itself: else processes on a CPU would not know of each other.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


class Processes(Protocol):
    """What is asked here of accelerate's Accelerator, its PartialState, or the only process."""

    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...


@dataclass(frozen=True)
class OneProcess:
    """The processes of a run that has one."""

    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True


ONE_PROCESS = OneProcess()


def mean(accelerator: Accelerator, *values: float) -> list[float]:
    """Means over the processes, the same in each: what they decide by, or they would part."""
    if accelerator.num_processes == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    means: list[float] = accelerator.reduce(shared, "mean").tolist()
    return means


def alone(processes: Processes, action: Callable[[], T]) -> T:
    """What the main process gets from `action`, in all of them. If it fails there, the others exit with 2."""
    if processes.num_processes == 1:
        return action()
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, "failed"]
    try:
        if processes.is_main_process:
            result = [action(), None]
    finally:
        broadcast_object_list(result)
        if result[1] and not processes.is_main_process:
            sys.exit(2)
    got: T = result[0]
    return got


def together(processes: Processes, action: Callable[[], T]) -> list[T]:
    """What each process gets from `action`, in all of them. If it fails in one, all end as in `alone`."""
    if processes.num_processes == 1:
        return [action()]
    from accelerate.utils import gather_object

    result: T | None = None
    fault: Exception | None = None
    try:
        result = action()
    except (UserError, OSError) as error:
        fault = error
    told: list[tuple[T, str | None]] = gather_object([(result, None if fault is None else str(fault))])
    for rank, (_, text) in enumerate(told):
        if text is not None:
            if not processes.is_main_process:
                sys.exit(2)
            raise fault or UserError(f"process {rank}: {text}")
    return [got for got, _ in told]


def check_same(processes: Processes, facts: Mapping[str, object]) -> None:
    """Raise UserError naming the process of which a fact is another one than of the main process."""

    def differing() -> None:
        for rank, (host, theirs) in enumerate(told):
            for name, value in facts.items():
                if theirs[name] != value:
                    raise UserError(
                        f"process {rank} on {host} has another {name} than process 0: {theirs[name]}, not "
                        f"{value}: give all processes the same files and the same command"
                    )

    told = together(processes, lambda: (socket.gethostname(), facts))
    alone(processes, differing)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that stays empty until SIGINT or SIGTERM comes; one that comes after it acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}
    first = 0.0

    def note(number: int, _: object) -> None:
        nonlocal first
        if not received:
            received.append(number)
            first = time.monotonic()
        elif time.monotonic() - first > SAME_SIGNAL_S:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)
