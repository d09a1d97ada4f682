"""A classifier's folder: read strictly, and only for the model whose latents it knows."""

import pytest
import torch
from conftest import TINY_TAESD, randomise_
from safetensors.torch import load_file, save_file
from tiny_classifier import save_classifier, tiny_classifier

from ldm.checkpoint import save_module
from ldm.checkpoint.beside.classifier import read_classifier
from ldm.errors import UserError
from ldm.models import AutoencoderTiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    return randomise_(AutoencoderTiny.from_config(TINY_TAESD))


@pytest.fixture
def folder(vae, tmp_path):
    return save_classifier(tmp_path / "classifier", vae)


def refused(folder, vae):
    with pytest.raises(UserError) as error:
        read_classifier(folder, vae, CPU)
    assert "\n" not in str(error.value).replace("\nWeights and config.json belong", "")
    return str(error.value)


def change_weights(folder, change):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_it_comes_back_as_it_was(folder, vae):
    made, read = tiny_classifier(vae), read_classifier(folder, vae, CPU)
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor(1.5, dtype=torch.float64)
    assert torch.allclose(read.network(x, sigma), made(x, sigma), rtol=1e-5)
    assert not any(each.requires_grad for each in read.network.parameters())


def test_its_hash_is_of_all_that_it_is(folder, vae, tmp_path):
    same = save_classifier(tmp_path / "same", vae)
    other = save_classifier(tmp_path / "other", vae, seed=1)
    first, second, third = (read_classifier(each, vae, CPU).sha256 for each in (folder, same, other))
    assert first == second != third
    config = folder / "config.json"
    config.write_text(config.read_text().replace("castle", "palace"))
    assert read_classifier(folder, vae, CPU).sha256 != first


def test_one_for_another_model_is_refused(folder):
    other = randomise_(AutoencoderTiny.from_config(TINY_TAESD), seed=1)
    assert "a classifier for another model: it knows the latents of another VAE" in refused(folder, other)


def test_what_is_no_classifier_is_refused(vae, tmp_path):
    assert "no classifier; give a folder that scripts/train_classifier.py" in refused(tmp_path, vae)
    save_module(vae, tmp_path / "vae")
    assert "holds a AutoencoderTiny, no classifier" in refused(tmp_path / "vae", vae)


def test_damage_is_named(folder, vae):
    change_weights(folder, lambda tensors: tensors["pool.weight"].fill_(torch.nan))
    assert "pool.weight" in refused(folder, vae)
    change_weights(folder, lambda tensors: tensors.update({"pool.weight": torch.zeros(5, 16)}))
    assert "pool.weight is [5, 16], config.json says [3, 16]" in refused(folder, vae)
    change_weights(folder, lambda tensors: tensors.pop("pool.weight"))
    assert "missing: pool.weight" in refused(folder, vae)
