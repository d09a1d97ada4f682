"""Recipes: what is shipped is valid, what is wrong is named."""

from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.train.recipe import load_recipe, loss_settings

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["postcard_vae", "postcard_clip", "postcard_unet"])
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
