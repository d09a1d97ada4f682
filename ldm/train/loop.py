"""The one training loop: VAE, CLIP, U-Net and the others differ only in their `Task`.

All randomness of a batch follows from (seed, step, micro, rank), so a run that is stopped and started again
goes on as if nothing had happened, and no loader has state to save. An optimisation step is the unit: one
that is interrupted, inside its accumulation too, is made again from its beginning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.train.heap import keep_freed_memory
from ldm.train.lock import only_run
from ldm.train.processes import alone, stop_signals
from ldm.train.recipe import Trainable
from ldm.train.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Tensor]


class Task(nn.Module, ABC):
    """What is trained: modules, a loss, and how to look at them. The loop optimises its parameters."""

    facts: Mapping[str, Any] = {}  # beside the recipe, what a run that is gone on with should have kept
    looks_first = False  # before the first step too: for weights that are not random
    draws_from_export = True  # so each look writes it; else only the end of the run does

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


def train(task: Task, recipe: Trainable, run_dir: Path) -> None:
    """Train `task` until the recipe's end, going on from the state in run_dir if it holds one.

    Writes run_dir/metrics.jsonl, state-<step>/, grids/<step>.png and export/ (EMA weights, if kept). SIGINT
    and SIGTERM end the run at once, saved: a step that is under way is made again after it is resumed.

    Raises:
        UserError: if another run is in run_dir, if its states are damaged or of another recipe, if the disk
            is full, or if the loss is NaN or Inf. The message names the last state, which is whole.
    """
    accelerator = _accelerator(recipe, run_dir)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with ExitStack() as stack:
        alone(accelerator, lambda: stack.enter_context(only_run(run_dir)))
        for tracker in accelerator.trackers:
            stack.callback(tracker.finish)
        run = Run(task, recipe, run_dir, accelerator)
        stopped = stack.enter_context(stop_signals())
        stack.enter_context(run.guarded())
        if run.fraction >= 1:
            run.say(f"at its end already, step {run.position.step}: raise max_train_steps to go on")
        if run.due(recipe.run.validation_steps) and (run.position.step or task.looks_first):
            run.look()  # at the beginning, or where the run ended before it could
        while run.fraction < 1 and run.step(stopped):
            if run.due(recipe.run.checkpointing_steps):
                run.save()
            if run.due(recipe.run.validation_steps):
                run.look()
        run.save()
        ended = run.fraction >= 1
        if ended:
            run.look()
        if not (ended and task.draws_from_export):
            run.export()
        if not ended:
            run.say(f"stopped at step {run.position.step}, saved: the same command goes on from there")


def check_tracker(name: str) -> None:
    """Raise UserError if what `report_to` names is not installed."""
    from accelerate.utils import is_tensorboard_available

    if name == "tensorboard" and not is_tensorboard_available():
        raise UserError("report_to is tensorboard, which is not installed: pip install tensorboard")


def _accelerator(recipe: Trainable, run_dir: Path) -> Accelerator:
    from accelerate import Accelerator

    tracker = recipe.run.report_to
    check_tracker(tracker)
    if tracker == "none":
        return Accelerator(mixed_precision=recipe.run.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=recipe.run.mixed_precision, log_with=tracker, project_dir=run_dir
    )
    accelerator.init_trackers("tensorboard")
    return accelerator
