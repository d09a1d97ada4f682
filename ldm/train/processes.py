"""What the processes of one run do together: all of it is nothing where there is only one."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

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


def mean(accelerator: Accelerator, *values: float) -> list[float]:
    """Means over the processes, the same in each: what they decide by, or they would part."""
    if accelerator.num_processes == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    means: list[float] = accelerator.reduce(shared, "mean").tolist()
    return means


def alone(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What the main process gets from `action`, in all of them. If it fails there, the others exit with 2."""
    if accelerator.num_processes == 1:
        return action()
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, "failed"]
    try:
        if accelerator.is_main_process:
            result = [action(), None]
    finally:
        broadcast_object_list(result)
        if result[1] and not accelerator.is_main_process:
            sys.exit(2)
    got: T = result[0]
    return got


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
