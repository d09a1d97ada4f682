"""Optimisers by name: a run against a plain loop with the library's own, and stopped against not stopped."""

import json
import sys

import pytest
import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from tiny_training import Line, exported, tiny_recipe
from transformers.optimization import Adafactor

from ldm.errors import UserError
from ldm.pretrain.recipe import Recipe
from ldm.train.loop import train
from ldm.train.optimiser import Muon, check_optimiser, lr_factor, make_optimiser
from ldm.train.recipe import OptimiserSection, validate
from ldm.train.state import newest_state

# name: (the recipe's settings, the library's own optimiser of the same)
LIBRARIES = {
    "prodigy": (
        {"learning_rate": 1.0, "optimizer_args": ["d0=1e-3", "betas=0.9,0.99", "use_bias_correction=True"]},
        lambda params: Prodigy(params, lr=1.0, d0=1e-3, betas=(0.9, 0.99), use_bias_correction=True),
    ),
    "adafactor": (
        {"optimizer_args": ["clip_threshold=0.5", "beta1=0.9"]},
        lambda params: Adafactor(
            params, lr=0.02, clip_threshold=0.5, beta1=0.9, scale_parameter=False, relative_step=False
        ),
    ),
    "lion": (
        {"optimizer_args": ["weight_decay=0.1", "betas=(0.8, 0.9)"]},
        lambda params: Lion(params, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9)),
    ),
    "schedulefree_adamw": (
        {"lr_scheduler": "constant", "ema_decay": 0, "optimizer_args": ["weight_decay=0.1", "r=0.5"]},
        lambda params: AdamWScheduleFree(params, lr=0.02, weight_decay=0.1, r=0.5),
    ),
}


def section(name, **more):
    return {"optimizer": name, "ema_decay": 0.0, "adam_beta2": 0.999, **LIBRARIES[name][0], **more}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def states(run_dir, file):
    return load_file(newest_state(run_dir) / f"{file}.safetensors")


def groups(run_dir):
    return json.loads((newest_state(run_dir) / "run.json").read_text())["groups"]


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_run_is_that_of_the_library_in_a_plain_loop(tmp_path, name, steps):
    settings = tiny_recipe(steps, other=section(name, lr_warmup_steps=0, max_grad_norm=0.5))
    ours = Line(dropout=0)
    train(ours, settings, tmp_path)

    theirs = Line(dropout=0)
    optimiser = LIBRARIES[name][1](theirs.parameters())
    rate = optimiser.param_groups[0]["lr"]
    if name == "schedulefree_adamw":
        optimiser.train()
    for step, batch in enumerate(ours.batches):
        optimiser.param_groups[0]["lr"] = rate * lr_factor(settings.optimiser, step, steps)
        theirs(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimiser.step()
        optimiser.zero_grad()
    if name == "schedulefree_adamw":
        optimiser.eval()
    begun = Line(dropout=0).state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(exported(tmp_path)[key], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, begun[key])


@pytest.mark.parametrize("call", [1, 5, 8])
@pytest.mark.parametrize("name", LIBRARIES)
def test_stopped_it_goes_on_bit_for_bit(tmp_path, name, call):
    """With looks and states on the way, which change nothing."""
    settings = tiny_recipe(9, validation_steps=2, checkpointing_steps=4, other=section(name))
    train(Line(), settings, tmp_path / "whole")
    train(Line(interrupt=call), settings, tmp_path / "parts")
    train(Line(), settings, tmp_path / "parts")
    for file in ("weights", "optimiser"):
        same(states(tmp_path / "parts", file), states(tmp_path / "whole", file))
    same(exported(tmp_path / "parts"), exported(tmp_path / "whole"))


def test_looks_at_a_schedule_free_run_do_not_change_it(tmp_path):
    for looks in (1, 100):
        settings = tiny_recipe(7, validation_steps=looks, other=section("schedulefree_adamw"))
        train(Line(), settings, tmp_path / str(looks))
    rarely = states(tmp_path / "100", "weights")
    same(states(tmp_path / "1", "weights"), rarely)
    # What is exported is the average x, not where gradients are taken.
    assert any(not torch.equal(value, rarely[key]) for key, value in exported(tmp_path / "100").items())


def test_a_nan_that_is_skipped_leaves_a_schedule_free_average_as_it_was(tmp_path):
    settings = tiny_recipe(4, on_nan="skip", other=section("schedulefree_adamw"))
    train(Line(poison={4}), settings, tmp_path / "skipped")
    train(Line(), tiny_recipe(3, other=section("schedulefree_adamw")), tmp_path / "three")
    assert groups(tmp_path / "skipped") == groups(tmp_path / "three")
    assert groups(tmp_path / "three")[0]["k"] == 3
    same(exported(tmp_path / "skipped"), exported(tmp_path / "three"))


def test_what_a_recipe_says_anew_holds_where_a_run_goes_on(tmp_path):
    """Prodigy's estimate comes from the state and is told, its weight decay is the recipe's."""
    at_once, args = {"lr_warmup_steps": 0}, [*LIBRARIES["prodigy"][0]["optimizer_args"], "weight_decay=0.5"]
    train(Line(), tiny_recipe(7, logging_steps=1, other=section("prodigy", **at_once)), tmp_path)
    (before,) = groups(tmp_path)
    assert before["k"] == 7
    assert before["d"] > 1e-3
    assert "weight_decay" not in before
    more = section("prodigy", **at_once, optimizer_args=args)
    train(Line(), tiny_recipe(8, logging_steps=1, other=more), tmp_path)
    (after,) = groups(tmp_path)
    assert after["k"] == 8
    assert after["d"] >= before["d"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["d"] for row in rows if "d" in row][6:] == [before["d"], after["d"]]


# --- names and settings ----------------------------------------------------------------------------------


def test_old_names_are_the_same():
    params = [torch.zeros(40, 40, requires_grad=True)]
    for given in ({"use_muon": True}, {"optimizer": "muon"}):
        assert type(make_optimiser(params, OptimiserSection(**given))) is Muon
    assert OptimiserSection(use_8bit_adam=True).chosen_optimizer == "adamw8bit"
    assert OptimiserSection().chosen_optimizer == "adamw"


def test_prodigys_rate_is_1_unless_another_is_given():
    assert OptimiserSection(optimizer="prodigy").learning_rate == 1
    assert OptimiserSection(optimizer="prodigy", learning_rate=0.5).learning_rate == 0.5
    params = [torch.zeros(2, requires_grad=True)]
    with pytest.warns(UserWarning, match=r"multiplies what it finds by learning_rate 0\.0001: 1 is usual"):
        make_optimiser(params, OptimiserSection(optimizer="prodigy", learning_rate=1e-4))


def test_settings_go_before_those_of_adamw():
    params = [torch.zeros(2, requires_grad=True)]
    made = make_optimiser(params, OptimiserSection(optimizer_args=("betas=0.5,0.6", "amsgrad=True")))
    assert (made.defaults["betas"], made.defaults["amsgrad"], made.defaults["eps"]) == (
        (0.5, 0.6),
        True,
        1e-8,
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer_args": ["d_coef"]}, "d_coef: write each setting once, as name=value"),
        ({"optimizer_args": ["eps=1", "eps=2"]}, "eps=2: write each setting once"),
        ({"optimizer_args": ["eps=tiny"]}, "eps=tiny: tiny is no number"),
        ({"optimizer_args": ["lr=1"]}, "lr is learning_rate"),
        ({"optimizer": "lion", "adam_beta2": 0.9}, "adam_beta2 is not lion's: give its own settings"),
        ({"optimizer": "lion", "use_muon": True}, "optimizer lion and use_muon: choose one"),
        ({"optimizer": "schedulefree_adamw", "lr_scheduler": "cosine"}, "goes without cosine"),
        ({"optimizer": "schedulefree_adamw", "ema_decay": 0.9}, "averages the weights itself"),
    ],
)
def test_settings_that_make_no_sense_are_told(given, said):
    raw = {"optimiser": given, "run": {"max_train_steps": 1}}
    with pytest.raises(UserError, match=said):
        validate(Recipe, raw, "a recipe")


@pytest.mark.parametrize(
    ("name", "arg", "said"),
    [
        ("prodigy", "growth=2", "optimizer prodigy does not take growth=2: .*unexpected keyword argument"),
        ("adafactor", "relative_step=True", "adafactor does not take relative_step=True: Cannot combine"),
        ("adamw", "betas=0.9", "optimizer adamw does not take betas=0.9"),
    ],
)
def test_what_an_optimiser_does_not_take_is_told_by_its_name(name, arg, said):
    with pytest.raises(UserError, match=said):
        check_optimiser(OptimiserSection(optimizer=name, optimizer_args=(arg,)))


@pytest.mark.parametrize(
    ("name", "module"),
    [("prodigy", "prodigyopt"), ("lion", "lion_pytorch"), ("schedulefree_adamw", "schedulefree")],
)
def test_a_library_that_is_missing_is_named(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"optimizer {name} needs {module}: pip install 'ldm\[optimisers\]'"):
        check_optimiser(OptimiserSection(optimizer=name))
