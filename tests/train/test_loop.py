"""The training loop: exact resume, learning-rate schedule, EMA, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.train.loop import Task, _lr_scale, train
from ldm.train.recipe import Recipe


class Line(Task):
    """Fits y = 3 x - 1 with noise; quick to train, and random enough to betray a lost state."""

    def __init__(self, poison: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.poison, self.calls = poison, 0

    def batch(self, rng, size):
        x = torch.randn(size, 1, generator=rng)
        return {"x": x, "y": 3 * x - 1 + 0.1 * torch.randn(size, 1, generator=rng)}

    def forward(self, batch):
        self.calls += 1
        loss = (self.layer(batch["x"]) - batch["y"]).square().mean()
        return (loss * float("nan") if self.calls == self.poison else loss), {}

    def evaluate(self):
        x = torch.linspace(-1, 1, 32)[:, None]
        return {"held_out": float((self.layer(x) - (3 * x - 1)).square().mean())}

    def picture(self, folder):
        return None

    def export(self, folder):
        folder.mkdir(exist_ok=True)
        torch.save([p.clone() for p in self.parameters()], folder / "ema.pt")


def recipe(steps: int, **run) -> Recipe:
    run = {
        "max_steps": steps,
        "mixed_precision": "no",
        "log_every": 5,
        "eval_every": 20,
        "save_every": 10,
    } | run
    return Recipe.model_validate({"run": run, "optimiser": {"lr": 0.02, "batch_size": 16, "warmup_steps": 5}})


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_learns(tmp_path):
    train(Line(), recipe(300), tmp_path)
    assert [row["held_out"] for row in rows(tmp_path) if "held_out" in row][-1] < 0.02


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, parts = Line(), Line()
    train(whole, recipe(40), tmp_path / "whole")

    stops = Line(poison=24)  # fails in step 23, after the state of step 20 was written
    with pytest.raises(FloatingPointError, match="step 23: the loss is nan"):
        train(stops, recipe(40), tmp_path / "parts")
    train(parts, recipe(40), tmp_path / "parts")

    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    exported = [torch.load(tmp_path / name / "export" / "ema.pt") for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*exported, strict=True))
    assert rows(tmp_path / "whole")[-1]["held_out"] == rows(tmp_path / "parts")[-1]["held_out"]


def test_a_finished_run_does_not_train_on(tmp_path):
    train(Line(), recipe(20), tmp_path)
    again = Line()
    train(again, recipe(20), tmp_path)
    assert again.calls == 0


def test_only_the_newest_state_is_kept_and_none_is_half_written(tmp_path):
    (tmp_path / ".state-00000010-killed").mkdir()
    train(Line(), recipe(40), tmp_path)
    assert [p.name for p in tmp_path.glob("*state-*")] == ["state-00000040"]
    assert not list(tmp_path.glob(".*"))


def test_ema_follows_its_recurrence(tmp_path):
    task = Line()
    values = []
    first = next(task.parameters())
    original = task.forward

    def spy(batch):
        values.append(first.detach().clone())
        return original(batch)

    task.forward = spy
    train(task, recipe(12), tmp_path)
    values.append(first.detach().clone())
    expected = values[0].double()
    for step, after in enumerate(values[1:]):
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * after.double()
    exported = torch.load(tmp_path / "export" / "ema.pt")[0]
    assert torch.allclose(exported.double(), expected, rtol=1e-5, atol=1e-6)


def test_learning_rate_warms_up_stays_and_decays_as_a_cosine():
    opt = recipe(10).optimiser
    assert _lr_scale(opt, 0, 0.0) == pytest.approx(1 / 5)
    assert _lr_scale(opt, 4, 0.0) == 1
    assert _lr_scale(opt, 100, 0.59) == 1
    assert _lr_scale(opt, 100, 0.8) == pytest.approx(0.02 + 0.98 * 0.5)
    assert _lr_scale(opt, 100, 1.0) == pytest.approx(0.02)
    middle = 0.02 + 0.49 * (1 + math.cos(math.pi * 0.25))
    assert _lr_scale(opt, 100, 0.7) == pytest.approx(middle)


def test_minutes_end_a_run(tmp_path):
    quick = recipe(10**9, max_minutes=0.02)
    train(Line(), quick, tmp_path)
    assert 0.02 <= json.loads(next(tmp_path.glob("state-*/position.json")).read_text())["seconds"] / 60 < 0.1
