"""A recipe that differs from that of the state a run goes on from: what is refused, said, or nothing new."""

import hashlib
import json

import pytest
from tiny_training import Line, tiny_recipe

from ldm.errors import UserError
from ldm.finetune.recipe import FinetuneRecipe
from ldm.pretrain.recipe import Recipe
from ldm.train.changes import check_recipe, digest
from ldm.train.loop import train
from ldm.train.state import Position, newest_state, save_state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 8}, "optimiser.train_batch_size 16 -> 8"),
        ({"parts": 2}, "optimiser.gradient_accumulation_steps 1 -> 2"),
        ({"seed": 3}, "run.seed 0 -> 3"),
    ],
)
def test_a_recipe_that_changed_in_what_matters_is_refused_by_name(tmp_path, change, said, capsys):
    train(Line(), tiny_recipe(10), tmp_path)
    with pytest.raises(UserError, match=rf"another recipe: {said}; .* --force"):
        train(Line(), tiny_recipe(12, **change), tmp_path)
    train(Line(), tiny_recipe(12, force=True, **change), tmp_path)
    assert newest_state(tmp_path).name == "state-00000012"


def test_model_processes_and_the_kind_of_optimiser_matter_too(tmp_path, state):
    before = {"model.width": 4, "run.processes": 1, "optimiser.kind": "AdamW", "optimiser.learning_rate": 0.1}
    folder = save_state(tmp_path, Position(), state, before, {})
    for key in ("model.width", "run.processes", "optimiser.kind"):
        with pytest.raises(UserError, match=f"another recipe: {key} {before[key]} -> other;"):
            check_recipe(folder, before | {key: "other"}, Recipe.changes())
    with pytest.raises(UserError, match=r"model.width 4 -> unset"):
        check_recipe(folder, {key: before[key] for key in before if key != "model.width"}, Recipe.changes())


# What was so in the list of names that the marks have replaced.
FIXED = (
    *("train_batch_size", "gradient_accumulation_steps", "seed", "resolution", "prediction_type"),
    *("lora_alpha", "initializer_token", "class_prompt", "model"),
)
SHAPES = (
    *("mode", "rank", "lora_targets", "lora_conv", "use_dora", "train_text_encoder", "inpainting"),
    *("placeholder_token", "num_vectors"),
)


@pytest.mark.parametrize("key", [*FIXED, *SHAPES, "vae", "revision", "pictures", "of_another_version"])
def test_what_fine_tuning_cannot_change_on_the_way(tmp_path, state, key):
    before = {"mode": "lora", "learning_rate": 0.1, key: "before"}
    folder, changes = save_state(tmp_path, Position(), state, before, {}), FinetuneRecipe.changes()
    with pytest.raises(UserError, match=f"another recipe: {key} before -> other;"):
        check_recipe(folder, before | {key: "other"}, changes)
    if key not in SHAPES:
        check_recipe(folder, before | {key: "other"}, changes, force=True)
        return
    with pytest.raises(UserError, match=f"another recipe: {key} before -> other;"):
        check_recipe(folder, before | {key: "other"}, changes, force=True)


def test_keys_that_a_version_did_not_know_are_their_defaults(tmp_path, state, capsys):
    """So a run goes on with a newer ldm, whatever a change of the new keys means."""
    before = {"mode": "lora", "rank": 4}
    folder = save_state(tmp_path, Position(), state, before, {})
    now = before | {"block_rank": [], "lora_conv": False, "masked_loss": False, "optimizer_args": []}
    changes, defaults = FinetuneRecipe.changes(), FinetuneRecipe.defaults()
    check_recipe(folder, now, changes, defaults=defaults)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"another recipe: lora_conv False -> True;"):
        check_recipe(folder, now | {"lora_conv": True}, changes, defaults=defaults)


def test_a_run_of_an_older_version_goes_on(tmp_path, capsys):
    train(Line(), tiny_recipe(10), tmp_path)
    (state,) = tmp_path.glob("state-*")
    values, manifest = (json.loads((state / name).read_text()) for name in ("recipe.json", "manifest.json"))
    for key in ("optimiser.optimizer", "run.distributed"):
        del values[key]
    text = json.dumps(values).encode()
    (state / "recipe.json").write_bytes(text)
    manifest["recipe"] = digest(values)
    manifest["files"]["recipe.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (state / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    train(Line(), tiny_recipe(12), tmp_path)
    assert "optimizer" not in capsys.readouterr().out
    assert newest_state(tmp_path).name == "state-00000012"


def test_postcards_of_another_size_are_another_run(tmp_path, state):
    folder = save_state(tmp_path, Position(), state, {"data.size": 64, "data.captions": 4}, {})
    with pytest.raises(UserError, match=r"another recipe: data\.size 64 -> 128;"):
        check_recipe(folder, {"data.size": 128, "data.captions": 4}, Recipe.changes())


def test_what_is_free_is_not_said(tmp_path, state, capsys):
    folder = save_state(tmp_path, Position(), state, {"run.force": False}, {})
    check_recipe(folder, {"run.force": True}, Recipe.changes())
    folder = save_state(tmp_path, Position(), state, {"force": False}, {})
    check_recipe(folder, {"force": True}, FinetuneRecipe.changes())
    assert capsys.readouterr().out == ""


def test_a_recipe_that_changed_in_something_else_goes_on_and_is_said(tmp_path, capsys):
    train(Line(), tiny_recipe(10), tmp_path)
    capsys.readouterr()
    train(Line(), tiny_recipe(10, lr=0.01), tmp_path)
    said = "the recipe has changed since state-00000010: optimiser.learning_rate 0.02 -> 0.01\n"
    assert capsys.readouterr().out.startswith(said)
