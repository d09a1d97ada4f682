"""The one training loop: VAE, CLIP and U-Net differ only in their `Task`.

All randomness of a step follows from (seed, step, rank), so a run that is stopped and started again goes on
as if nothing had happened, and no loader has state to save.
"""

from __future__ import annotations

import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.train.checkpoint import Position, load_state, save_state
from ldm.train.recipe import OptimiserSection, Recipe

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


def train(task: Task, recipe: Recipe, run_dir: Path) -> None:
    """Train `task` until the recipe's end, resuming from run_dir if it holds a state.

    Writes run_dir/metrics.jsonl, grids/<step>.png, state-<step>/ and export/ (EMA weights).
    SIGINT and SIGTERM end the run after the current step, saved. Raises FloatingPointError if the loss is not
    finite: the last state saved is whole, and the same command goes on from there.
    """
    from accelerate import Accelerator

    run, opt = recipe.run, recipe.optimiser
    run_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=run.mixed_precision)
    task.to(accelerator.device)
    task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(
        task.parameter_groups(opt.lr), betas=opt.betas, weight_decay=opt.weight_decay, fused=True
    )
    rates = [group["lr"] for group in optimiser.param_groups]
    trained = [p for p in task.parameters() if p.requires_grad]
    ema = [p.detach().clone() for p in trained]
    position = load_state(run_dir, task, ema, optimiser)
    wrapped, optimiser = accelerator.prepare(torch.compile(task) if run.compile else task, optimiser)
    log = _Log(run_dir / "metrics.jsonl", accelerator.is_main_process)
    with _stop_signals() as stopped:
        while not stopped and (fraction := _fraction(recipe, position)) < 1:
            began = time.perf_counter()
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * _lr_scale(opt, position.step, fraction)
            rng = _generator(run.seed, position.step, accelerator.process_index)
            batch = {k: v.to(accelerator.device) for k, v in task.batch(rng, opt.batch_size).items()}
            values = _descend(accelerator, wrapped, optimiser, batch, opt.max_grad_norm)
            if not torch.isfinite(values["grad_norm"]):
                raise FloatingPointError(f"step {position.step}: the loss is {float(values['loss'])}")
            _update_ema(ema, trained, opt.ema_decay, position.step)
            position = Position(
                position.step + 1,
                position.samples + opt.batch_size * accelerator.num_processes,
                position.seconds + time.perf_counter() - began,
            )
            position = _agree(accelerator, position, stopped)
            log.step(position, run.log_every, values)
            if accelerator.is_main_process:
                if position.step % run.eval_every == 0:
                    with _weights(trained, ema):
                        _look(task, run_dir, position, log)
                if position.step % run.save_every == 0:
                    save_state(run_dir, position, task, ema, _inner(optimiser))
    if accelerator.is_main_process:
        save_state(run_dir, position, task, ema, _inner(optimiser))
        with _weights(trained, ema):
            _look(task, run_dir, position, log)


def _descend(
    accelerator: Accelerator, task: nn.Module, optimiser: Any, batch: Batch, max_norm: float
) -> dict[str, Tensor]:
    """One step down the gradient, unless it is not finite. Returns what to log."""
    loss, extra = task(batch)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_([p for p in task.parameters() if p.requires_grad], max_norm)
    if torch.isfinite(norm):
        optimiser.step()
    optimiser.zero_grad()
    return {"loss": loss.detach(), "grad_norm": norm, **extra}


def _agree(accelerator: Accelerator, position: Position, stopped: list[int]) -> Position:
    """Several processes make the same steps: they share a mean clock, and a stop signal to one stops all."""
    if accelerator.num_processes == 1:
        return position
    shared = torch.tensor([position.seconds, float(bool(stopped))], device=accelerator.device)
    seconds, stop = accelerator.reduce(shared, "mean").tolist()
    if stop and not stopped:
        stopped.append(signal.SIGTERM)
    return replace(position, seconds=seconds)


def _inner(optimiser: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimiser, "optimizer", optimiser)
    return inner


def _fraction(recipe: Recipe, position: Position) -> float:
    """How much of the run is done, 0 to 1: by steps or by minutes, whichever is further."""
    by_steps = position.step / recipe.run.max_steps if recipe.run.max_steps else 0.0
    by_time = position.seconds / 60 / recipe.run.max_minutes if recipe.run.max_minutes else 0.0
    return max(by_steps, by_time)


def _lr_scale(opt: OptimiserSection, step: int, fraction: float) -> float:
    """Linear warm-up, flat, cosine from `decay_from` to 2 %."""
    warm = min(1.0, (step + 1) / opt.warmup_steps) if opt.warmup_steps else 1.0
    if fraction < opt.decay_from:
        return warm
    through = (fraction - opt.decay_from) / (1 - opt.decay_from)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * through)))


def _generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The step's only source of randomness. Distinct for steps below 2^32 and ranks below 2^16."""
    return torch.Generator().manual_seed(((seed * 2**16 + rank) * 2**32 + step) % 2**63)


@torch.no_grad()
def _update_ema(ema: list[Tensor], trained: list[nn.Parameter], decay: float, step: int) -> None:
    """ema += (1 - d)(p - ema); d = min(decay, (1 + step) / (10 + step)): early steps are forgotten."""
    torch._foreach_lerp_(ema, [p.detach() for p in trained], 1 - min(decay, (1 + step) / (10 + step)))


@contextmanager
def _weights(trained: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """`trained` hold `values` inside the block, and what they held before after it."""
    kept = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p, value in zip(trained, values, strict=True):
            p.copy_(value)
        try:
            yield
        finally:
            for p, value in zip(trained, kept, strict=True):
                p.copy_(value)


def _look(task: Task, run_dir: Path, position: Position, log: _Log) -> None:
    """Held-out figures, a grid, and the weights as they are now."""
    task.eval()
    with torch.no_grad():
        log.write(position, task.evaluate())
        task.export(run_dir / "export")
        picture = task.picture(run_dir / "export")
    if picture is not None:
        (run_dir / "grids").mkdir(exist_ok=True)
        picture.save(run_dir / "grids" / f"{position.step:08d}.png")
    task.train()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that stays empty until SIGINT or SIGTERM comes; a second signal acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)


class _Log:
    """Means of what the steps report, as JSON lines in a file and on the terminal."""

    def __init__(self, path: Path, active: bool) -> None:
        self.path, self.active = path, active
        self.sums: dict[str, Tensor | float] = {}  # tensors: a GPU is not waited for between logs
        self.count = 0
        self.last: Position | None = None

    def step(self, position: Position, every: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.count += 1
        if position.step % every == 0:
            means = {name: float(total) / self.count for name, total in self.sums.items()}
            if self.last is not None:
                made = position.samples - self.last.samples
                means["samples_per_s"] = made / (position.seconds - self.last.seconds)
            self.write(position, means)
            self.sums, self.count, self.last = {}, 0, position

    def write(self, position: Position, values: dict[str, float]) -> None:
        if not self.active:
            return
        row = {
            "step": position.step,
            "samples": position.samples,
            "minutes": round(position.seconds / 60, 2),
            **{name: float(f"{value:.5g}") for name, value in values.items()},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
