"""A training under way: what a step changes, where it stands, and what it writes."""

from __future__ import annotations

import errno
import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.checkpoint.io import read_json
from ldm.errors import UserError, abbreviate
from ldm.files import whole_file
from ldm.images.formats import encode
from ldm.images.provenance import COMPOSITE, TRAINED, Marks
from ldm.runtime import is_out_of_memory, memory_format
from ldm.train.changes import BATCHES, PROCESSES, batches_a_step, check_recipe, flat
from ldm.train.optimiser import lr_factor, make_optimiser
from ldm.train.prefetch import Place, Prefetcher
from ldm.train.processes import alone, check_same, mean
from ldm.train.progress import Progress
from ldm.train.recipe import Trainable
from ldm.train.sharding import Sharded, full_tensor
from ldm.train.state import (
    Position,
    State,
    find_state,
    load_state,
    newest_state,
    save_state,
)
from ldm.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ldm.train.task import Batch, Task

MOST_SKIPPED = 10  # steps in a row: then the weights are at fault and not a picture
SMALLER = "not enough memory: lower train_batch_size, and raise gradient_accumulation_steps to make up for it"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk that is full, or full for us


class Run:
    """A training under way: what a step changes, where it stands, and its folder."""

    def __init__(self, task: Task, recipe: Trainable, run_dir: Path, accelerator: Accelerator) -> None:
        self.task, self.recipe, self.run_dir, self.accelerator = task, recipe, run_dir, accelerator
        opt = recipe.optimiser
        if recipe.run.early_stop_patience and not task.judged_by:
            raise UserError("early_stop_patience: this training has no held-out loss to go by: leave it out")
        self.values = dict(flat(recipe.model_dump(mode="json"))) | dict(task.facts)
        if accelerator.num_processes > 1:
            check_same(accelerator, self.values | {"ldm": __version__, "weights": _digest(task)})
        task.to(accelerator.device)
        task.to(memory_format=memory_format(accelerator.device))  # type: ignore[call-overload]
        task.train()
        shards = recipe.run.distributed == "fsdp" and accelerator.num_processes > 1
        self.sharded = Sharded(task, accelerator.device, accelerator.num_processes) if shards else None
        optimiser = make_optimiser(task.parameter_groups(opt.learning_rate), opt)
        self.rates = [group["lr"] for group in optimiser.param_groups]
        self.trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        averaged = self.trained if opt.ema_decay else {}
        self.ema = {name: p.detach().clone() for name, p in averaged.items()}
        self.state = State(self.trained | _buffers(task), self.ema, optimiser)
        self.values |= {"optimiser.kind": type(optimiser).__name__, PROCESSES: accelerator.num_processes}
        self.progress = Progress(
            run_dir,
            accelerator.device,
            recipe.run.logging_steps,
            accelerator.is_main_process,
            accelerator.log if accelerator.trackers else None,
        )
        self.position, self.saved_step = Position(), -1
        self._resume()
        model = torch.compile(task) if recipe.run.compile else task
        # What is sharded is wrapped no further: DDP would want all weights.
        self.model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=shards)
        self.optimiser = accelerator.prepare_optimizer(optimiser, device_placement=False)
        self.optimiser.train()  # of those that know another way to look at their weights
        self.batches = Prefetcher(self._batch, accelerator.device)

    def _resume(self) -> None:
        (found, self.batches_a_step), window = alone(self.accelerator, self._find), None
        self.values[BATCHES] = self.batches_a_step
        if found is not None:
            self.log(f"going on from {found}")
            self.position, extra = load_state(found, self.state)
            if found.parent == self.run_dir:
                self.saved_step = self.position.step
            window = extra["window"]
            if self.accelerator.scaler is not None and extra["scaler"]:
                self.accelerator.scaler.load_state_dict(extra["scaler"])
            self._tell_rate(found)
        self.progress.resume(self.position, self.fraction, window)

    def _tell_rate(self, found: Path) -> None:
        """Of a longer or shorter run, a schedule goes over all of it: say how the rate jumps by that."""
        opt, now, step = self.recipe.optimiser, self.recipe.run.max_train_steps, self.position.step
        values = read_json(found / "recipe.json")
        before = values.get("max_train_steps") or values.get("run.max_train_steps")
        if now and before and now != before:
            factors = [lr_factor(opt, step, total) for total in (before, now)]
            if factors[0] != factors[1]:
                self.log(
                    f"{opt.lr_scheduler} now goes over {now} steps, not {before}: at step {step} the rate is "
                    f"{factors[1]:.3g} of learning_rate, not {factors[0]:.3g}"
                )

    def _find(self) -> tuple[Path | None, int]:
        """The state to go on from, and how many batches make a step."""
        run, accumulation = self.recipe.run, self.recipe.optimiser.gradient_accumulation_steps
        found = find_state(self.run_dir, run.resume_from_checkpoint, run.force)
        before = {} if found is None else read_json(found / "recipe.json")
        batches = batches_a_step(before, accumulation, self.accelerator.num_processes)
        if found is not None:
            now, recipe = self.values | {BATCHES: batches}, self.recipe
            check_recipe(found, now, recipe.changes(), run.force, defaults=recipe.defaults())
        return found, batches

    @property
    def parts(self) -> int:
        """Batches of this process whose gradients make one step."""
        return self.batches_a_step // int(self.accelerator.num_processes)

    @property
    def fraction(self) -> float:
        """How much of the run is done, 0 to 1: by steps or by minutes, whichever is further."""
        run = self.recipe.run
        by_steps = self.position.step / run.max_train_steps if run.max_train_steps else 0.0
        by_time = self.position.seconds / 60 / run.minutes if run.minutes else 0.0
        return max(by_steps, by_time)

    @property
    def _total_steps(self) -> float:
        """Steps of the whole run; for one that minutes end, as many as its speed so far makes likely."""
        return self.position.step / self.fraction if self.fraction else self.recipe.run.max_train_steps or 1

    def ends_early(self) -> bool:
        """Whether as many looks as the recipe has patience for were no better than one before them."""
        patience, figure = self.recipe.run.early_stop_patience, self.task.judged_by
        if not patience:
            return False
        best, waited = alone(self.accelerator, lambda: self.progress.best(figure))
        if best is None or waited < patience:
            return False
        self.log(
            f"ended early, at step {self.position.step}: {waited} looks without a better {figure} than "
            f"{best[figure]:.5g} of step {best['step']}, which is in {self.run_dir / 'best'}"
        )
        return True

    def due(self, every: int) -> bool:
        return self.position.step % every == 0

    def log(self, line: str) -> None:
        if self.accelerator.is_main_process:
            print(line, flush=True)

    # --- a step -------------------------------------------------------------------------------------------

    def step(self, stopped: list[int]) -> bool:
        """One step of the optimiser. False, and none was made, if a signal has come to any process."""
        began = time.perf_counter()
        opt, position, accelerator = self.recipe.optimiser, self.position, self.accelerator
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * lr_factor(opt, position.step, self._total_steps)
        values = self._gradients(stopped)
        if values is None:
            return False
        norm = float(full_tensor(accelerator.clip_grad_norm_(self.trained.values(), opt.max_grad_norm)))
        values["grad_norm"] = norm
        (values["loss"],) = mean(accelerator, values["loss"])
        finite = math.isfinite(values["loss"]) and math.isfinite(norm)
        if not finite:
            self._not_finite(values["loss"])
            self.optimiser.zero_grad()  # so that the step changes nothing but the scale of fp16's gradients
        if finite or accelerator.scaler is not None:
            self.optimiser.step()
        self.optimiser.zero_grad()
        if finite:
            self._average(position.step)
        if "d" in self.optimiser.param_groups[0]:  # the rate that Prodigy has found
            values["d"] = self.optimiser.param_groups[0]["d"]
        samples = opt.train_batch_size * self.batches_a_step
        (seconds,) = mean(accelerator, time.perf_counter() - began)
        self.position = Position(
            position.step + 1,
            position.samples + samples,
            position.seconds + seconds,
            position.skipped + (not finite),
            0 if finite else position.skipped_in_a_row + 1,
        )
        self.progress.step(self.position, self.fraction, values if finite else {})
        return True

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """ema += (1 - d)(p - ema); d = min(decay, (1 + step) / (10 + step)): early steps are forgotten."""
        if self.ema:
            decay = min(self.recipe.optimiser.ema_decay, (1 + step) / (10 + step))
            now = [p.detach() for p in self.trained.values()]
            torch._foreach_lerp_(list(self.ema.values()), now, 1 - decay)

    def _gradients(self, stopped: list[int]) -> dict[str, float] | None:
        """Add up the gradients of one step. Returns the means of what to log; None if it is to stop."""
        parts, totals = self.parts, dict[str, Tensor]()
        step = self.position.step
        for micro in range(parts):
            if any(mean(self.accelerator, len(stopped))):
                return None
            last = micro == parts - 1
            batch = self.batches.take((step, micro), (step + 1, 0) if last else (step, micro + 1))
            torch.manual_seed(self._seed("forward", (step, micro)))  # for dropout
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, extra = self.model(batch)
                self.accelerator.backward(loss / parts)
            for name, value in {"loss": loss, **extra}.items():
                totals[name] = totals.get(name, 0) + value.detach().float()
        numbers = torch.stack(list(totals.values())).tolist()  # the GPU is waited for once
        return {name: total / parts for name, total in zip(totals, numbers, strict=True)}

    def _batch(self, place: Place) -> Batch:
        """A pure function of the place, as it may be made ahead."""
        rng = torch.Generator().manual_seed(self._seed("batch", place))
        number = place[0] * self.batches_a_step + self._of_step(place)
        return self.task.batch(rng, self.recipe.optimiser.train_batch_size, number)

    def _of_step(self, place: Place) -> int:
        """Which of a step's batches this process's is: they are dealt out in turn."""
        micro, accelerator = place[1], self.accelerator
        return int(micro * accelerator.num_processes + accelerator.process_index)

    def _seed(self, what: str, place: Place) -> int:
        """Of the batch, whichever process has it.

        8 bytes of a hash: torch's CPU generator takes in the lower 32 bits, so packing would lose some.
        """
        parts = (what, self.recipe.run.seed, place[0], self._of_step(place), 0)
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")

    def _not_finite(self, loss: float) -> None:
        """Say so, or raise UserError, as the recipe has chosen."""
        position, on_nan = self.position, self.recipe.run.on_nan
        if self.accelerator.scaler is not None and math.isfinite(loss):
            what, on_nan = "the gradients overflow fp16 and are scaled down", "skip"
        else:
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are NaN or Inf"
        message = f"step {position.step}: {what}{self._named()}"
        if on_nan == "skip" and position.skipped_in_a_row < MOST_SKIPPED - 1:
            self.log(f"{message}: skipped, {position.skipped + 1} so far")
            return
        advice = "lower learning_rate and run the same command again"
        if on_nan == "skip":
            message = f"{message}: the {MOST_SKIPPED}th in a row"
        else:
            advice += ", or set on_nan=skip"
        alone(self.accelerator, partial(_fail, f"{message}: {advice}"))

    def _named(self) -> str:
        """The files that the step's batches were made of, drawn once more."""
        from accelerate.utils import gather_object

        step = self.position.step
        self.batches.settle()
        names = gather_object(
            [name for micro in range(self.parts) for name in self.task.names(self._batch((step, micro)))]
        )
        return f", of {abbreviate(names, 8)}" if names else ""

    # --- its folder ---------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state, unless this step's is there."""
        if self.saved_step == self.position.step:
            return
        scaler = self.accelerator.scaler
        extra = {"window": self.progress.window, "scaler": scaler.state_dict() if scaler else None}
        keep = self.recipe.run.checkpoints_total_limit
        save_state(self.run_dir, self.position, self.state, self.values, extra, keep, self.accelerator)
        self.saved_step = self.position.step

    def validate(self) -> None:
        """Held-out figures, a grid, and the weights as they are now, unless this step has them."""
        with self._averaged():
            alone(self.accelerator, self._validate)

    def export(self) -> None:
        """The weights as they are now."""
        with self._averaged():
            alone(self.accelerator, lambda: self.task.export(self.run_dir / "export"))

    def _validate(self) -> None:
        if self.progress.evaluated == self.position.step:
            return
        figures = self.task.evaluate()
        if self.task.draws_from_export:
            self.task.export(self.run_dir / "export")
        picture = self.task.picture(self.run_dir / "export")
        best, _ = self.progress.best(self.task.judged_by)
        told = figures.get(self.task.judged_by, math.inf)
        if self.recipe.run.early_stop_patience and (best is None or told < best[self.task.judged_by]):
            self.task.export(self.run_dir / "best")
        if picture is not None:
            marks = Marks(self.recipe.run.provenance, COMPOSITE if self.task.shows_originals else TRAINED)
            name = f"{self.position.step:08d}.png"
            with whole_file(self.run_dir / "grids" / name) as aside, aside.open("wb") as file:
                encode(picture, file, {}, origin=marks.origin(picture, None))
        self.progress.evaluation(self.position, figures)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Show how it goes inside the block; what ends it there says which state is left to go on from."""
        try:
            with self.progress:
                yield
        except (UserError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
            text = SMALLER if is_out_of_memory(error) else str(error)
            # A full disk is told by an OSError or a SafetensorError.
            full = isinstance(error, OSError) and error.errno in FULL
            if isinstance(error, OSError | RuntimeError) and not full and text is not SMALLER:
                raise
            newest = newest_state(self.run_dir)
            left = f"the last good state is {newest}" if newest else "no state has been saved"
            raise UserError(f"{text}; {left}") from None

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside the block the task holds averaged weights, where there are any, ready to be looked at.

        They are the EMA, or what a schedule-free optimiser averages. Of what is sharded, the main process's
        task holds all. Afterwards all is as before, to the bit.
        """
        self.batches.settle()
        self.task.eval()
        averages = self.trained if hasattr(self.state.optimiser, "eval") else self.ema
        kept = {name: self.trained[name].detach().clone() for name in averages}
        with torch.no_grad():
            self.optimiser.eval()
            for name, average in self.ema.items():
                self.trained[name].copy_(average)
            try:
                with self.sharded.whole(self.accelerator.is_main_process) if self.sharded else nullcontext():
                    yield
            finally:
                self.optimiser.train()
                for name, value in kept.items():
                    self.trained[name].copy_(value)
                self.task.train()


def _digest(task: Task) -> str:
    """SHA-256 of the weights and buffers that a task begins with."""
    found = hashlib.sha256()
    for name, tensor in task.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _fail(message: str) -> NoReturn:
    raise UserError(message)


def _buffers(task: Task) -> dict[str, Tensor]:
    """What of the task's state is a buffer, and no parameter or how one is rounded."""
    buffers = {name for name, _ in task.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in task.state_dict().items() if name in buffers}
