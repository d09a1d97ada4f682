"""When a run ends: hours, no better looks, more steps than before; and what trackers are told."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import Line, exported, tiny_recipe

from ldm.errors import UserError
from ldm.pretrain.recipe import Recipe
from ldm.train.loop import train
from ldm.train.recipe import validate
from ldm.train.state import newest_state

LOSSES = (5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 9.0, 1.0, 1.0)  # of looks after each second step
EVERY_TWO = {"validation_steps": 2, "checkpointing_steps": 3, "early_stop_patience": 3}


class Judged(Line):
    """Its looks say what LOSSES say, one after the other."""

    judged_by = "held_out"

    def __init__(self, run_dir, **options):
        super().__init__(**options)
        self.run_dir = run_dir

    def evaluate(self):
        rows = [row for row in log(self.run_dir) if "held_out" in row]
        return {"held_out": LOSSES[len(rows)]}


def log(run_dir):
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def weights(run_dir):
    return load_file(newest_state(run_dir) / "weights.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_run_ends_after_as_many_looks_as_it_has_patience_for(tmp_path, capsys):
    train(Judged(tmp_path), tiny_recipe(100, **EVERY_TWO), tmp_path)
    assert [row["held_out"] for row in log(tmp_path) if "held_out" in row] == list(LOSSES[:7])
    assert newest_state(tmp_path).name == "state-00000014"  # 2.0 at step 8; an equal one is no better
    said = capsys.readouterr().out
    assert "ended early, at step 14: 3 looks without a better held_out than 2 of step 8, which is in" in said
    best = load_file(tmp_path / "best" / "ema.safetensors")
    assert not same(best, exported(tmp_path))
    stopped = Judged(tmp_path / "8", interrupt=8)  # in the step that the best look comes after
    train(stopped, tiny_recipe(100, **EVERY_TWO), tmp_path / "8")
    assert newest_state(tmp_path / "8").name == "state-00000008"
    assert same(best, exported(tmp_path / "8"))
    again = Judged(tmp_path)
    train(again, tiny_recipe(100, **EVERY_TWO), tmp_path)
    assert again.calls == 0


@pytest.mark.parametrize("call", [1, 8, 9, 12])
def test_stopped_on_the_way_it_ends_early_at_the_same_step(tmp_path, call):
    for name, interrupts in (("whole", [0]), ("parts", [call, 0])):
        for interrupt in interrupts:
            run_dir = tmp_path / name
            train(Judged(run_dir, interrupt=interrupt), tiny_recipe(100, **EVERY_TWO), run_dir)
    assert newest_state(tmp_path / "parts").name == newest_state(tmp_path / "whole").name
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    for place in ("best", "export"):
        assert same(*(load_file(tmp_path / n / place / "ema.safetensors") for n in ("parts", "whole")))


def test_without_a_figure_to_go_by_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="early_stop_patience: this training has no held-out loss"):
        train(Line(), tiny_recipe(4, early_stop_patience=2), tmp_path)


def test_hours_are_minutes(tmp_path):
    assert tiny_recipe(4, max_train_hours=0.5).run.minutes == 30
    train(Line(), tiny_recipe(10**6, max_train_hours=1e-6), tmp_path)
    assert 1 <= int(newest_state(tmp_path).name[6:]) < 1000
    with pytest.raises(UserError, match="max_minutes and max_train_hours: give one of them"):
        validate(Recipe, {"run": {"max_minutes": 1, "max_train_hours": 1}}, "a recipe")
    assert validate(Recipe, {"run": {"max_train_hours": 1}}, "a recipe").run.minutes == 60


# --- more steps ------------------------------------------------------------------------------------------


def test_a_longer_run_goes_by_the_schedule_of_all_of_it_and_says_so(tmp_path, capsys, monkeypatch):
    cosine = {"lr_scheduler": "cosine", "lr_warmup_steps": 0}
    train(Line(), tiny_recipe(4, other=cosine), tmp_path)
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    capsys.readouterr()
    train(Line(), tiny_recipe(8, other=cosine), tmp_path)
    assert rates == pytest.approx([0.02 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(4, 8)])
    said = capsys.readouterr().out
    assert "run.max_train_steps 4 -> 8" in said
    assert "cosine now goes over 8 steps, not 4: at step 4 the rate is 0.5 of learning_rate, not 0" in said


def test_a_longer_run_of_a_constant_rate_is_that_of_one_that_was_never_shorter(tmp_path, capsys):
    for steps in (4, 8):
        train(Line(), tiny_recipe(steps, other={"lr_scheduler": "constant"}), tmp_path / "parts")
    assert "now goes over" not in capsys.readouterr().out
    train(Line(), tiny_recipe(8, other={"lr_scheduler": "constant"}), tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


# --- trackers --------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb, which keeps what it is told."""
    from accelerate import tracking, utils
    from accelerate.state import AcceleratorState

    told = types.SimpleNamespace(init={}, config={}, rows=[], ended=0)

    class Run:
        def log(self, values, step=None, **_):
            told.rows.append((step, values))

        def finish(self):
            told.ended += 1

    def init(**given):
        told.init = given
        return Run()

    module = types.ModuleType("wandb")
    module.init = init
    module.config = types.SimpleNamespace(update=lambda values, **_: told.config.update(values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(tracking, "_available_trackers", [utils.LoggerType.WANDB])
    AcceleratorState._reset_state(reset_partial_state=True)
    return told


def test_a_tracker_hears_the_recipe_and_every_row(tmp_path, wandb):
    run_dir = tmp_path / "mine"
    train(Line(), tiny_recipe(20, report_to="wandb"), run_dir)
    assert wandb.init == {"project": "ldm", "name": "mine", "dir": str(run_dir)}
    assert wandb.config["optimiser.learning_rate"] == "0.02"
    place = ("step", "samples", "minutes")
    rows = [(row["step"], {k: v for k, v in row.items() if k not in place}) for row in log(run_dir)]
    assert wandb.rows == rows
    assert [step for step, _ in rows] == [5, 10, 15, 20, 20]
    assert wandb.ended == 1


def test_tensorboards_own_reader_finds_what_the_log_says(tmp_path):
    """Every figure of every row, at its step, as fp32 holds it, after a run that was stopped too."""
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="no tensorboard: pip install tensorboard",
    )
    from accelerate.state import AcceleratorState

    for interrupt in (12, 0):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(Line(interrupt=interrupt), tiny_recipe(20, report_to="tensorboard"), tmp_path)
    reader = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {
        (tag, event.step, event.value) for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)
    }
    expected = {
        (name, row["step"], float(np.float32(value)))
        for row in log(tmp_path)
        for name, value in row.items()
        if name not in ("step", "samples", "minutes")
    }
    assert {name for name, _, _ in expected} >= {"loss", "double", "grad_norm", "samples_per_s", "held_out"}
    assert found == expected


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(f"accelerate.utils.is_{name}_available", lambda: False)
    with pytest.raises(UserError, match=f"report_to is {name}, which is not installed: pip install {name}"):
        train(Line(), tiny_recipe(2, report_to=name), tmp_path)
