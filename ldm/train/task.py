"""What is trained: the one class that the loop and a run know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Task(nn.Module, ABC):
    """What is trained: modules, a loss, and how they are validated. The loop optimises its parameters."""

    facts: Mapping[str, Any] = {}  # beside the recipe, what a run that is gone on with should have kept
    validates_first = False  # before the first step too: for weights that are not random
    shows_originals = False  # beside what is drawn, in its grids
    shards = False  # its networks are called as wholes only, as FSDP needs it
    judged_by = ""  # the held-out figure by which a run ends early, the lower the better
    draws_from_export = True  # so each validation writes it; else only the end of the run does

    @abstractmethod
    def batch(self, rng: torch.Generator, size: int, number: int) -> Batch:
        """A batch on the CPU, with all its noise: `forward` is a pure function of it.

        `number` counts the batches of the run, those of all processes and of accumulation too.
        """

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and what to log beside it."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Held-out figures, from fixed noise; called with the EMA weights in place."""

    @abstractmethod
    def picture(self, folder: Path) -> Image.Image | None:
        """A grid to look at, drawn with the weights just exported to `folder`."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the weights in the form that `ldm.load` or the next trainer reads; EMA weights in place."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters and their learning rates."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def names(self, batch: Batch) -> list[str]:
        """The files that a batch was made of, for messages; where the task cannot tell, none."""
        return []
