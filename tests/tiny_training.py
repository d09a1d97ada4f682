"""A training so small that a test can run, stop and kill it many times."""

import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.errors import UserError
from ldm.pretrain.recipe import Recipe
from ldm.train.loop import train
from ldm.train.recipe import OptimiserSection
from ldm.train.task import Task


class Line(Task):
    """Fits y = 3 x - 1 with noise; quick to train, and random enough to betray a lost state.

    interrupt: the call of `forward` (from 1) in which SIGTERM comes. poison: calls that give NaN.
    """

    shards = True

    def __init__(self, poison=(), interrupt=0, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.poison, self.interrupt, self.calls = poison, interrupt, 0
        self.batches = []

    def batch(self, rng, size, number):
        x = torch.randn(size, 1, generator=rng)
        return {"x": x, "y": 3 * x - 1 + 0.1 * torch.randn(size, 1, generator=rng)}

    def forward(self, batch):
        self.calls += 1
        self.batches.append(batch)
        if self.calls == self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = (self.layer(batch["x"]) - batch["y"]).square().mean()
        return (loss * float("nan") if self.calls in self.poison else loss), {"double": 2 * loss.detach()}

    def evaluate(self):
        x = torch.linspace(-1, 1, 32)[:, None]
        return {"held_out": float((self.layer(x) - (3 * x - 1)).square().mean())}

    def picture(self, folder):
        return None

    def export(self, folder):
        folder.mkdir(exist_ok=True)
        save_file({name: p.clone() for name, p in self.named_parameters()}, folder / "ema.safetensors")


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "ema.safetensors")


def tiny_recipe(
    steps: int,
    parts: int = 1,
    batch_size: int = 16,
    lr: float = 0.02,
    muon: bool = False,
    other: dict | None = None,
    **run,
) -> Recipe:
    """`parts` are the micro-steps of an optimisation step; `other` are more settings of the optimiser."""
    optimiser = {"learning_rate": lr, "adam_beta2": 0.99, "ema_decay": 0.999, "train_batch_size": batch_size}
    optimiser |= {"gradient_accumulation_steps": parts, "lr_warmup_steps": 5, "use_muon": muon}
    optimiser |= {"lr_scheduler": "warmup_stable_decay", **(other or {})}
    optimiser |= {name: run.pop(name) for name in run.keys() & OptimiserSection.model_fields.keys()}
    every = {"logging_steps": 5, "validation_steps": 20, "checkpointing_steps": 10}
    run = {"max_train_steps": steps, "mixed_precision": "no"} | every | run
    return Recipe.model_validate({"run": run, "optimiser": optimiser})


# --- in processes of their own ---------------------------------------------------------------------------


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: what a full disk does to a writer."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def slow_look(patience, seconds):
    """Looks take `seconds`, and torch waits for so many of `patience` where it is not told otherwise."""
    evaluate = Line.evaluate

    def slow(task):
        time.sleep(seconds)
        return evaluate(task)

    Line.evaluate = slow
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=patience)


def child(run_dir, ready=None, rank=0, port=0, sabotage=None, interrupt=0, **recipe):
    """Train in this process, as one of two where there is a port. Exits with 2 after a UserError."""
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(run_dir / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if port:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if sabotage:
        sabotage[0](*sabotage[1:])
    if ready:
        ready.set()
    task = Line(interrupt=interrupt)
    try:
        train(task, tiny_recipe(**recipe), run_dir)
    except UserError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None
    if port and task.batches:
        torch.distributed.destroy_process_group()
        save_file(task.batches[0], run_dir / f"batch-{rank}.safetensors")
