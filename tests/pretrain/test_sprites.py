"""The sprite world's trainers: data made in parts, a text encoder that names, all stages to a model."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import ldm
from ldm.checkpoint import load_text_encoder, load_tokenizer
from ldm.errors import UserError
from ldm.postcards.sprites import mixture
from ldm.postcards.sprites.labels import PAINTS
from ldm.postcards.vocabulary import KINDS
from ldm.pretrain import sprite_stages
from ldm.pretrain.data import load_pictures
from ldm.pretrain.naming import NamingTask, learn_vocabulary, new_text_encoder
from ldm.pretrain.recipe import DataSection, load_recipe
from ldm.pretrain.sprite_stages import STAGES, train_all
from ldm.pretrain.sprites import in_parts, make_mixture, scene_of, sprite_latents, sprite_pictures
from ldm.pretrain.vae import load_vae

ROOT = Path(__file__).parents[2]
OLD = ROOT / "weights" / "postcard"


def section(tmp_path, **others):
    sprites = {"things": 12, "postcards": 0.3}
    values = {"count": 20, "held_out": 4, "captions": 2, "size": 64, "cache": tmp_path, "sprites": sprites}
    return DataSection.model_validate(values | others)


# --- data --------------------------------------------------------------------------------------------------


def test_what_was_stopped_goes_on_where_it_was(tmp_path):
    made = []

    def make(start, stop):
        if stop == 600 and not made.count((512, 600)):
            made.append((512, 600))
            raise KeyboardInterrupt
        made.append((start, stop))
        return {"a": np.arange(start, stop, dtype=np.int16), "b": np.ones((stop - start, 2), np.float16)}

    with pytest.raises(KeyboardInterrupt):
        in_parts(tmp_path / "x", 600, make)
    arrays = in_parts(tmp_path / "x", 600, make)
    assert made == [(0, 256), (256, 512), (512, 600), (512, 600)]
    np.testing.assert_array_equal(arrays["a"], np.arange(600))
    assert arrays["b"].shape == (600, 2)
    in_parts(tmp_path / "x", 600, make)
    assert len(made) == 4


def test_pictures_are_the_scenes_drawn(tmp_path):
    data = section(tmp_path)
    seen, held_out = sprite_pictures(data)
    assert (len(seen), len(held_out)) == (20, 4)
    mixed = make_mixture(data)
    for number, image in ((0, seen.images[0]), (19, seen.images[19]), (22, held_out.images[2])):
        np.testing.assert_array_equal(image, mixture.render(scene_of(mixed, data, number)[0], 64))
    again, _ = sprite_pictures(data)
    assert again.captions == seen.captions


def test_latents_are_those_of_the_pictures_and_of_the_repainted_ones(tmp_path):
    data, vae = section(tmp_path, count=40), load_vae(OLD)
    seen, held_out = sprite_latents(data, vae, load_tokenizer(OLD / "tokenizer"), repainted=True)
    pictures, _ = sprite_pictures(data)
    with torch.no_grad():
        exact = vae.encode_latents(pictures.tensors(torch.arange(40)))
    assert (seen.latents.float() - exact).abs().mean() < 0.01 * exact.abs().mean() + 0.01
    assert (len(held_out), seen.latents.shape[1:]) == (4, (16, 8, 8))
    assert (seen.weights.shape[1:], seen.things.shape[1:]) == ((8, 8), (4, 4))
    assert (seen.kinds, seen.paints) == (len(KINDS) + 12, PAINTS)
    assert int(seen.things.max()) <= seen.kinds * seen.paints
    changed = (seen.repainted != seen.latents).flatten(1).any(1)
    painted = [
        mixture.repainted(scene_of(make_mixture(data), data, n)[0], random.Random(0)) is not None
        for n in range(40)
    ]
    assert changed.tolist() == painted
    assert (seen.names_colours.any(1) <= changed).all()
    assert seen.names_colours.any()


def test_other_trainers_do_not_take_sprites(tmp_path):
    with pytest.raises(UserError, match=r"train_sprites\.py"):
        load_pictures(section(tmp_path))


@pytest.mark.parametrize(
    ("value", "said"),
    [({"styles": ["oil"]}, "styles"), ({"things": 0}, "things"), ({"compositions": {"x": 1}}, "comp")],
)
def test_a_wrong_section_is_told(tmp_path, value, said):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"sprites": value}, "run": {"max_train_steps": 1}}))
    with pytest.raises(UserError, match=rf"data\.sprites\.{said}"):
        load_recipe(recipe, [])


# --- the text encoder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    learn_vocabulary(section(folder, count=60), 150, 40, folder / "tokenizer")
    return folder / "tokenizer"


CONFIG = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_text_encoder_learns_to_name(tmp_path, tokenizer):
    torch.manual_seed(0)
    data = section(tmp_path, count=60, held_out=64)
    task = NamingTask(data, tokenizer, new_text_encoder(CONFIG, load_tokenizer(tokenizer)), {})
    before = task.evaluate()
    optimiser = torch.optim.AdamW(task.parameter_groups(1e-2))
    rng = torch.Generator().manual_seed(0)
    for _ in range(60):
        loss, _ = task(task.batch(rng, 32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = task.evaluate()
    assert after["held_out_named"] > before["held_out_named"] + 0.3
    assert after["held_out_named_in_new_words"] > 0.3


def test_padding_that_is_cut_changes_nothing(tmp_path, tokenizer):
    task = NamingTask(section(tmp_path), tokenizer, new_text_encoder(CONFIG, load_tokenizer(tokenizer)), {})
    texts = ["a dog", "two cars on a table at night, 3d render"]
    full = task.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    cut = task._ids(texts)
    assert cut.shape[1] < full.shape[1]
    with torch.no_grad():
        a, b = (task.text_encoder(input_ids=ids).pooler_output for ids in (full, cut))
    torch.testing.assert_close(a, b)


def test_what_an_old_text_encoder_knows_is_kept():
    old, known = load_text_encoder(OLD / "text_encoder", torch.float32), load_tokenizer(OLD / "tokenizer")
    config = {name: getattr(old.config, name) for name in (*CONFIG, "hidden_act")}
    same = new_text_encoder(config, known, (old, known))
    ids = known(["a red car at night"], return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(same(input_ids=ids).pooler_output, old(input_ids=ids).pooler_output)
    narrow = new_text_encoder(config | {"intermediate_size": 64}, known, (old, known))
    name = next(each for each in narrow.state_dict() if each.endswith("layers.0.mlp.fc1.weight"))
    torch.testing.assert_close(narrow.state_dict()[name], old.state_dict()[name][:64])


# --- all stages --------------------------------------------------------------------------------------------


@pytest.fixture
def configs(tmp_path):
    """The shipped recipes, tiny."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for stage in STAGES:
        recipe = yaml.safe_load((ROOT / "configs" / f"sprites_{stage}.yaml").read_text(encoding="utf-8"))
        recipe["data"] |= {"count": 12, "held_out": 4, "captions": 1}
        recipe["data"]["sprites"] |= {"things": 12}
        recipe["run"] |= {"max_train_steps": 2, "validation_steps": 2, "checkpointing_steps": 1}
        recipe["optimiser"]["train_batch_size"] = 2
        if stage != "clip":
            recipe["data"]["size"] = 64
        if stage == "vae":
            recipe["model"] |= {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
        if stage == "clip":
            recipe["model"]["merges"] = 60
            recipe["model"]["text_config"] |= CONFIG | {"projection_dim": 32}
        if stage == "unet":
            recipe["model"]["unet"] |= {"block_out_channels": [16, 16, 16], "cross_attention_dim": 32}
            recipe["model"]["unet"] |= {
                "attention_head_dim": 2,
                "addition_embed_type_num_heads": 2,
                "sample_size": 8,
            }
            recipe["model"]["defaults"]["num_inference_steps"] = 1
            recipe["model"]["prompts"] = ["a dog", "a car"]
        (folder / f"sprites_{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_all_stages_make_a_model_and_a_second_call_does_nothing(configs, tmp_path):
    run_dir = tmp_path / "run"
    assert train_all(configs, run_dir, None, {})
    model = ldm.load(run_dir / "model", device="cpu")
    first, last = (
        dict(load_vae(run_dir / each / "export").named_parameters()) for each in ("vae", "decoder")
    )
    for name, value in model.vae.named_parameters():
        assert torch.equal(value.bfloat16(), last[name].bfloat16())
        if name.startswith("encoder."):
            assert torch.equal(first[name], last[name])
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert model.world.plurals["car"] == "cars"
    assert model("a dog", num_inference_steps=1, seed=0).images[0].size == (64, 64)
    stamps = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    assert train_all(configs, run_dir, None, {})
    assert stamps == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    # The denoiser alone goes on from a model, on its autoencoder and its words as they are.
    old, again = run_dir / "model", tmp_path / "again"
    assert train_all(configs, again, old, {}, old)
    assert not (again / "vae" / "metrics.jsonl").exists()
    further = ldm.load(again / "unet" / "export", device="cpu")
    for name, value in model.vae.state_dict().items():
        assert torch.equal(further.vae.state_dict()[name], value)
    assert further.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert further.world == model.world
    with pytest.raises(UserError, match="has nothing to keep: vae or text_encoder and tokenizer and"):
        train_all(configs, tmp_path / "other", None, {}, run_dir / "data")


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_stops_and_goes_on(configs, tmp_path, stage, monkeypatch):
    """A signal in a stage's first step ends the run after it; the same call goes on to the end."""
    run_dir, real, stopped = tmp_path / "run", sprite_stages.train, []

    def stopping(task, recipe, folder):
        batch = task.batch

        def signalled(*args):
            if folder.name == stage and not stopped:
                stopped.append(stage)
                signal.raise_signal(signal.SIGTERM)
            return batch(*args)

        task.batch = signalled
        return real(task, recipe, folder)

    monkeypatch.setattr(sprite_stages, "train", stopping)
    assert not train_all(configs, run_dir, None, {})
    assert {path.parent.name for path in run_dir.glob("*/ended")} == set(STAGES[: STAGES.index(stage)])
    assert train_all(configs, run_dir, None, {})
    log = (run_dir / stage / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    assert max(row["step"] for row in rows) == 2


def test_a_stage_that_there_is_not_is_told(configs, tmp_path):
    with pytest.raises(UserError, match="tower is no stage: they are vae, clip, unet, decoder"):
        train_all(configs, tmp_path / "run", None, {"tower": ["run.max_train_steps=1"]})
