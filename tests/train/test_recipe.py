"""Recipes: what is shipped is valid, what is wrong is named."""

from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.pretrain.recipe import load_recipe
from ldm.train.recipe import loss_settings

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["postcard_vae", "postcard_clip", "postcard_unet", "postcard_decoder"])
def test_shipped_recipes_are_valid(name):
    assert load_recipe(CONFIGS / f"{name}.yaml", []).run.max_minutes


def test_overrides(tmp_path):
    recipe = load_recipe(
        CONFIGS / "postcard_vae.yaml",
        ["optimiser.learning_rate=2e-4", "run.max_train_steps=7", "data.size=64"],
    )
    assert (recipe.optimiser.learning_rate, recipe.run.max_train_steps, recipe.data.size) == (2e-4, 7, 64)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimiser.rate=1", "optimiser.rate"),
        ("optimiser.learning_rate=-1", "optimiser.learning_rate"),
        ("data.size=100", "data.size"),
        ("run.mixed_precision=fp8", "run.mixed_precision"),
        ("run.max_train_steps", "section.key=value"),
        ("data.compositions={four: 1}", "four is no composition"),
        ("data.compositions={one: 0}", "weight above 0"),
        ("data.compositions={one: .inf}", "data.compositions.one"),
    ],
)
def test_wrong_values_are_named(override, named):
    with pytest.raises(UserError, match=named):
        load_recipe(CONFIGS / "postcard_vae.yaml", [override])


def test_a_run_without_an_end_is_refused(tmp_path):
    (tmp_path / "endless.yaml").write_text("run: {seed: 1}\n")
    with pytest.raises(UserError, match="max_train_steps or max_minutes"):
        load_recipe(tmp_path / "endless.yaml", [])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml", [])
    (tmp_path / "broken.yaml").write_text("run: {seed: 1\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_recipe(tmp_path / "broken.yaml", [])


def test_a_loss_key_that_a_trainer_does_not_have_is_named():
    assert loss_settings({"noise": 0.1, "l2": 1.0}, {"l2": 2.0}) == {"noise": 0.1, "l2": 2.0}
    with pytest.raises(UserError, match=r"loss\.noize is unknown: this trainer has noise, l2"):
        loss_settings({"noise": 0.1, "l2": 1.0}, {"noize": 0.2})


def test_losses_are_weights_and_shares():
    known = {"a": 1.0, "b": 0.5}
    assert loss_settings(known, {"a": 3.0, "b": 1.0}, shares=("b",)) == {"a": 3.0, "b": 1.0}
    for given, told in (
        ({"c": 1.0}, "loss.c is unknown: this trainer has a, b"),
        ({"a": -1.0}, "loss.a must be at least 0"),
        ({"a": float("nan")}, "loss.a must be at least 0"),
        ({"b": 1.5}, "loss.b must be from 0 to 1"),
    ):
        with pytest.raises(UserError, match=told):
            loss_settings(known, given, shares=("b",))


def test_one_optimiser_is_chosen():
    with pytest.raises(UserError, match="exclude each other"):
        load_recipe(
            CONFIGS / "postcard_vae.yaml", ["optimiser.use_8bit_adam=true", "optimiser.use_muon=true"]
        )
