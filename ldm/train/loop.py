"""The one training loop: VAE, CLIP, U-Net and the others differ only in their `Task`.

All randomness of a batch follows from (seed, step, its number in the step), so a run that is stopped and
started again goes on as if nothing had happened, and no loader has state to save. An optimisation step is
the unit: one that is interrupted, inside its accumulation too, is made again from its beginning.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldm.errors import UserError
from ldm.kernels.malloc import freed_memory_kept
from ldm.runtime import has_bf16
from ldm.train.changes import flat
from ldm.train.lock import only_run
from ldm.train.processes import alone, partial_state, stop_signals
from ldm.train.recipe import Trainable
from ldm.train.run import Run
from ldm.train.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(task: Task, recipe: Trainable, run_dir: Path) -> bool:
    """Train `task` until the recipe's end, going on from the state in run_dir if it holds one.

    Writes run_dir/metrics.jsonl, state-<step>/, grids/<step>.png and export/ (EMA weights, if kept). SIGINT
    and SIGTERM end the run at once, saved: a step that is under way is made again after it is resumed.
    Returns whether it has come to the recipe's end.

    Raises:
        UserError: if another run is in run_dir, if its states are damaged or of another recipe, if the disk
            is full, or if the loss is NaN or Inf. The message names the last state, which is whole.
    """
    check_sharding(recipe)
    if recipe.run.distributed == "fsdp" and not task.shards:
        raise UserError("distributed fsdp is for fine-tuning in modes full and lora: take ddp")
    accelerator = _accelerator(recipe, run_dir)
    with freed_memory_kept() if accelerator.device.type == "cpu" else nullcontext():
        return _train(task, recipe, run_dir, accelerator)


def _train(task: Task, recipe: Trainable, run_dir: Path, accelerator: Accelerator) -> bool:
    with ExitStack() as stack:
        alone(accelerator, lambda: stack.enter_context(only_run(run_dir)))
        for tracker in accelerator.trackers:
            stack.callback(tracker.finish)
        run = Run(task, recipe, run_dir, accelerator)
        stack.callback(run.batches.close)
        stopped = stack.enter_context(stop_signals())
        stack.enter_context(run.guarded())
        if run.fraction >= 1:
            run.log(f"at its end already, step {run.position.step}: raise max_train_steps to go on")
        if run.due(recipe.run.validation_steps) and (run.position.step or task.validates_first):
            run.validate()  # at the beginning, or where the run ended before it could
        early = run.ends_early()
        while run.fraction < 1 and not early and run.step(stopped):
            if run.due(recipe.run.checkpointing_steps):
                run.save()
            if run.due(recipe.run.validation_steps):
                run.validate()
                early = run.ends_early()
        run.save()
        ended = early or run.fraction >= 1
        if ended:
            run.validate()
        if not (ended and task.draws_from_export):
            run.export()
        if not ended:
            run.log(f"stopped at step {run.position.step}, saved: the same command goes on from there")
        return ended


def check_tracker(name: str) -> None:
    """Raise UserError if what `report_to` names is not installed."""
    from accelerate import utils

    if name != "none" and not getattr(utils, f"is_{name}_available")():
        raise UserError(f"report_to is {name}, which is not installed: pip install {name}")


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Raise UserError if a device does not compute so. A CPU that lacks bf16 is only slow in it."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision fp16 needs a GPU: give bf16 or no, or leave it out")
    if mixed_precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError("mixed_precision bf16 needs a GPU that has it, unlike this one: give fp16 or no")


def check_sharding(recipe: Trainable) -> None:
    """Raise UserError for what cannot be done with weights of which each process has its share."""
    faults = {
        "use_muon": recipe.optimiser.use_muon and "Muon wants whole matrices",
        "use_8bit_adam": recipe.optimiser.use_8bit_adam and "bitsandbytes wants whole weights",
        "optimizer": recipe.optimiser.chosen_optimizer != "adamw" and "only adamw has been tried on rows",
        "mixed_precision": recipe.run.mixed_precision == "fp16" and "fp16 scales its gradients; give bf16",
        "compile": recipe.run.compile and "torch.compile would gather all weights at once",
    }
    for name, fault in faults.items():
        if recipe.run.distributed == "fsdp" and fault:
            raise UserError(f"distributed fsdp does not go with {name}: {fault}; leave it out, or take ddp")


def _accelerator(recipe: Trainable, run_dir: Path) -> Accelerator:
    from accelerate import Accelerator

    tracker = recipe.run.report_to
    check_tracker(tracker)
    check_precision(recipe.run.mixed_precision, partial_state().device)
    accelerator = Accelerator(
        mixed_precision=recipe.run.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=run_dir,
    )
    _begin_tracking(accelerator, recipe, run_dir)
    return accelerator


def _begin_tracking(accelerator: Accelerator, recipe: Trainable, run_dir: Path) -> None:
    """A run of the project ldm, called as its folder, with its recipe; tensorboard's lies in the folder."""
    name = run_dir.resolve().name
    values = {key: str(value) for key, value in flat(recipe.model_dump(mode="json")) if value is not None}
    match recipe.run.report_to:
        case "tensorboard":
            accelerator.init_trackers("tensorboard")
        case "wandb":
            accelerator.init_trackers("ldm", values, {"wandb": {"name": name, "dir": str(run_dir)}})
        case "mlflow":
            accelerator.init_trackers("ldm", values, {"mlflow": {"run_name": name}})
