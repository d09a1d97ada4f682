"""The one training loop: VAE, CLIP and U-Net differ only in their `Task`.

All randomness of a batch follows from (seed, step, micro, rank), so a run that is stopped and started again
goes on as if nothing had happened, and no loader has state to save. An optimisation step is the unit: one
that is interrupted, inside its accumulation too, is made again from its beginning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.train.lock import only_run
from ldm.train.processes import alone, stop_signals
from ldm.train.recipe import Recipe
from ldm.train.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Tensor]


class Task(nn.Module, ABC):
    """What is trained: modules, a loss, and how to look at them. The loop optimises its parameters."""

    @abstractmethod
    def batch(self, rng: torch.Generator, size: int) -> Batch:
        """A batch on the CPU, with all its noise: `forward` is a pure function of it."""

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


def train(task: Task, recipe: Recipe, run_dir: Path) -> None:
    """Train `task` until the recipe's end, going on from the state in run_dir if it holds one.

    Writes run_dir/metrics.jsonl, grids/<step>.png, state-<step>/ and export/ (EMA weights). SIGINT and
    SIGTERM end the run at once, saved: a step that is under way is made again after it is resumed.

    Raises:
        UserError: if another run is in run_dir, if its states are damaged or of another recipe, if the disk
            is full, or if the loss is NaN or Inf. The message names the last state, which is whole.
    """
    accelerator = _accelerator(recipe, run_dir)
    with ExitStack() as stack:
        alone(accelerator, lambda: stack.enter_context(only_run(run_dir)))
        for tracker in accelerator.trackers:
            stack.callback(tracker.finish)
        run = Run(task, recipe, run_dir, accelerator)
        stopped = stack.enter_context(stop_signals())
        stack.enter_context(run.guarded())
        if run.position.step and run.due(recipe.run.eval_every):
            run.look()  # where the run ended before it could
        while run.fraction < 1 and run.step(stopped):
            if run.due(recipe.run.save_every):
                run.save()
            if run.due(recipe.run.eval_every):
                run.look()
        run.save()
        if run.fraction < 1:
            run.export()
            run.say(f"stopped at step {run.position.step}, saved: the same command goes on from there")
        else:
            run.look()


def _accelerator(recipe: Recipe, run_dir: Path) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import is_tensorboard_available

    tracker = recipe.run.report_to
    if tracker == "none":
        return Accelerator(mixed_precision=recipe.run.mixed_precision)
    if not is_tensorboard_available():
        raise UserError("run.report_to is tensorboard, which is not installed: pip install tensorboard")
    accelerator = Accelerator(
        mixed_precision=recipe.run.mixed_precision, log_with=tracker, project_dir=run_dir
    )
    accelerator.init_trackers("tensorboard")
    return accelerator
