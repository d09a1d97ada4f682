"""`ldm train-image-prompt`: begins with the keys and values of the text, learns beside the U-Net alone."""

import json
import shutil

import diffusers
import pytest
import torch
from conftest import relative_error
from PIL import Image
from tiny_families import FAMILIES
from tiny_finetune import QUICK, arguments, interrupted, result, write_pictures
from tiny_image_prompts import make_encoder

import ldm
from ldm.cli import main
from ldm.errors import UserError
from ldm.finetune import finetune as module
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.models.attention import Attention


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "image_encoder"
    make_encoder(folder)
    return folder


@pytest.fixture
def task(families, data, encoder, tmp_path, monkeypatch):
    """A factory: the task of a training that has not begun."""

    def make(family, **options):
        tasks = []
        monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.train()))
        monkeypatch.setattr(module, "_report", lambda *_: None)
        given = {"model": str(families(family)[0]), "train_data_dir": data, "output_dir": tmp_path / "run"}
        given |= {"mode": "image_prompt", "image_encoder": str(encoder), "num_validation_images": 0}
        finetune(FinetuneRecipe.model_validate(QUICK | given | {"train_batch_size": 3} | options))
        return tasks[0]

    return make


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_the_adapter_learns_and_all_of_it(task, family):
    ours = task(family)
    layers = {each.name: each for each in ours.unet.modules() if isinstance(each, Attention)}
    for name, number in ours.adapter.numbers.items():
        own = ours.adapter.ip_adapter[number]
        assert torch.equal(own.to_k_ip.weight, layers[name].to_k.weight)
        assert torch.equal(own.to_v_ip.weight, layers[name].to_v.weight)
    batch = ours.batch(torch.Generator().manual_seed(1), 3, 0)
    loss, _ = ours.forward(batch)
    loss.backward()
    trained = {id(p) for group in ours.parameter_groups(1.0) for p in group["params"]}
    for name, p in ours.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (id(p) in trained), name
    assert {id(p) for p in ours.adapter.parameters()} == trained


def test_each_picture_is_told_its_own_embedding(task, monkeypatch):
    """And one that is dropped is told as a drawing without a picture is: by zeros."""
    ours = task("sd1", image_dropout=0.4)
    batch = ours.batch(torch.Generator().manual_seed(3), 3, 0) | {"t": torch.tensor([5, 500, 990])}
    whole = ours._embeddings(ours.splits.train.at(0))
    kept = batch["image"].abs().sum(1) > 0
    assert torch.equal(batch["image"][kept], whole[kept])
    with torch.no_grad():
        together = ours._predict(batch)
        rows = [{name: value[k : k + 1] for name, value in batch.items()} for k in range(3)]
        assert relative_error(together, torch.cat([ours._predict(row) for row in rows])) < 1e-5
        swapped = ours._predict(batch | {"image": whole.flip(0)})
        assert relative_error(together, swapped) > 1e-3
        monkeypatch.setattr(type(ours), "_text", FinetuneTask._text)
        assert relative_error(together, ours._predict(batch)) > 1e-3


def test_gradients_are_the_same_when_layers_are_computed_twice(task):
    """As the keys and values of pictures must be, too."""
    found = []
    for twice in (False, True):
        ours = task("sd1", gradient_checkpointing=twice, image_dropout=0.0)
        loss, _ = ours.forward(ours.batch(torch.Generator().manual_seed(1), 3, 0))
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in ours.adapter.parameters()]))
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_from_the_command_to_a_file_that_diffusers_draws_with(families, data, encoder, tmp_path, family):
    model, out = families(family)[0], tmp_path / "run"
    options = {"image_encoder": encoder, "max_train_steps": 6, "held_out": 0.25}
    argv = arguments(model, data, out, learning_rate=3e-3, validation_steps=6, **options)
    assert main(["train-image-prompt", *argv[1:]]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert losses[-1] < losses[0]
    file = out / "export" / "ip_adapter.safetensors"
    pipe = ldm.load(model, dtype="fp32", device="cpu").with_ip_adapter(file, encoder)
    peer = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(model)
    peer.set_progress_bar_config(disable=True)
    peer.load_ip_adapter(str(file.parent), "", file.name, image_encoder_folder=str(encoder))
    with Image.open(data / "0.png") as image:
        shown = image.convert("RGB")
    common = {"num_inference_steps": 2, "output_type": "latent", "prompt": "sea", "ip_adapter_image": shown}
    common |= {"height": 32, "width": 32, "latents": torch.randn(1, 4, 8, 8)}
    assert relative_error(pipe(**common).images, peer(**common).images) < 1e-4


def test_stopped_it_goes_on_bit_for_bit(families, data, encoder, tmp_path, monkeypatch, capsys):
    """Also what is left out at random; and not with another image encoder at the same place."""
    model = families("sd1")[0]
    options = {"train_batch_size": 2, "max_train_steps": 3, "caption_dropout": 0.3, "image_dropout": 0.3}
    options |= {"checkpointing_steps": 2, "held_out": 0, "ema_decay": 0.9, "num_validation_images": 0}

    own = shutil.copytree(encoder, tmp_path / "encoder")

    def train(output):
        argv = arguments(model, data, output, **options, image_encoder=own)
        return main(["train-image-prompt", *argv[1:]])

    assert train(tmp_path / "whole" / "run") == 0
    forward = FinetuneTask.forward
    for call in (2, 0):
        monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
        assert train(tmp_path / "parts" / "run") == 0
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")
    make_encoder(own, num_hidden_layers=2)
    options["max_train_steps"] = 4
    assert train(tmp_path / "parts" / "run") == 2
    assert "image_encoder_sha256" in capsys.readouterr().err


def test_what_is_told_before_anything_is_read(data, tmp_path, families, encoder):
    given = {"train_data_dir": data, "output_dir": tmp_path / "run", "mode": "image_prompt"}
    with pytest.raises(ValueError, match="needs image_encoder"):
        FinetuneRecipe.model_validate(given)
    with pytest.raises(ValueError, match="leaves as it is"):
        FinetuneRecipe.model_validate(given | {"image_encoder": str(encoder), "inpainting": True})
    with pytest.raises(ValueError, match="image_encoder is not allowed in mode lora"):
        FinetuneRecipe.model_validate(given | {"image_encoder": str(encoder), "mode": "lora"})
    model = str(families("sd1")[0])
    with pytest.raises(UserError, match="no CLIP folder"):
        finetune(
            FinetuneRecipe.model_validate(QUICK | given | {"model": model, "image_encoder": str(tmp_path)})
        )
