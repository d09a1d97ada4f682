"""The batches of a run, where it computes: beside a GPU's step a thread makes the next one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeAlias

import torch

from ldm.train.task import Batch

Place: TypeAlias = tuple[int, int]  # step of the optimiser, part of its accumulation


class Prefetcher:
    """`make` gives the batch of a place, on the CPU: always the same one, whoever asks and when.

    On a CPU nothing is made ahead, as the thread would take cores from the step.
    """

    def __init__(self, make: Callable[[Place], Batch], device: torch.device) -> None:
        self.make, self.device = make, device
        self.on_cuda = device.type == "cuda"
        # A thread begins with the first card, where pinning memory would take some of it.
        begin = partial(torch.cuda.set_device, device) if self.on_cuda else None
        self.pool = ThreadPoolExecutor(1, "next batch", begin) if device.type != "cpu" else None
        self.coming: tuple[Place, Future[Batch]] | None = None

    def take(self, place: Place, following: Place) -> Batch:
        """The batch of `place`, on the device; the one of `following` begins. Raises what `make` does."""
        ahead, self.coming = self.coming, None
        batch = ahead[1].result() if ahead is not None and ahead[0] == place else self._pinned(place)
        if self.pool is not None:
            self.coming = following, self.pool.submit(self._pinned, following)
        return {name: value.to(self.device, non_blocking=self.on_cuda) for name, value in batch.items()}

    def settle(self) -> None:
        """Wait until nothing is made, so that networks which make batches can be used or changed."""
        if self.coming is not None:
            wait([self.coming[1]])

    def close(self) -> None:
        """End the thread. What it was making is not wanted any more, nor what went wrong there."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def _pinned(self, place: Place) -> Batch:
        """Made; for CUDA in memory from which it is copied while the computer goes on."""
        batch = self.make(place)
        return {name: value.pin_memory() for name, value in batch.items()} if self.on_cuda else batch
