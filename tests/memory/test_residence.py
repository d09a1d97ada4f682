"""Weights that are in memory only while they are used: the same numbers, and none before and after."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint import load_module
from ldm.errors import UserError
from ldm.memory.residence import Sleeping, Stay, asleep, home_of, in_use, leave

CPU = torch.device("cpu")


@pytest.fixture
def unet(tiny_folder):
    with asleep(CPU):
        loaded = load_module(tiny_folder / "unet", torch.float32).eval()
    yield loaded
    leave()


def held(module):
    """Bytes of a module's weights in memory."""
    return sum(each.untyped_storage().nbytes() for each in module.parameters())


def call(unet):
    with torch.no_grad():
        return unet(torch.ones(1, 4, 8, 8), torch.tensor(1.0), torch.ones(1, 3, 24))


def test_nothing_is_in_memory_until_a_network_is_called(unet, tiny_folder):
    assert held(unet) == 0
    ready = load_module(tiny_folder / "unet", torch.float32).eval()
    assert torch.equal(call(unet), call(ready))
    assert held(unet) == sum(each.nbytes for each in ready.parameters())


def test_layers_come_one_by_one(unet, tiny_folder, monkeypatch):
    home_of(unet).stay = Stay.BY_LAYER
    most, wake = [0], Sleeping.wake

    def watched(self):
        wake(self)
        most[0] = max(most[0], held(unet))

    monkeypatch.setattr(Sleeping, "wake", watched)
    out = call(unet)
    assert held(unet) == 0
    assert 0 < most[0] < sum(each.nbytes for each in unet.parameters()) / 3
    assert torch.equal(out, call(load_module(tiny_folder / "unet", torch.float32).eval()))


def test_one_network_leaves_when_another_is_used(unet, tiny_folder):
    with asleep(CPU):
        vae = load_module(tiny_folder / "vae", torch.float32)
    call(unet)
    with in_use(vae):
        assert held(vae) > 0
        assert held(unet) == 0
    leave()
    assert held(vae) == 0


def test_copies_share_what_comes_and_goes_and_a_deep_copy_has_its_own(unet):
    from ldm.adapters.layers import share

    shared, own = share(unet), copy.deepcopy(unet)
    assert held(own) > 0
    call(shared)
    assert held(unet) == held(own)
    assert not any(isinstance(each, Sleeping) for each in own.parameters())


def test_damage_is_told_when_weights_are_read(tiny_folder, tmp_path):
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((tiny_folder / "unet" / name).read_bytes())
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.bias"] = tensors["conv_in.bias"] * float("nan")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with asleep(CPU):
        unet = load_module(tmp_path, torch.float32)
    with pytest.raises(UserError, match=r"conv_in\.bias holds NaN"):
        call(unet)
    leave()


def test_a_model_with_a_limit_stays_where_it_was_loaded(tiny_folder):
    with pytest.raises(UserError, match="max_memory"):
        ldm.load(tiny_folder, device="cpu", max_memory="8GiB").to(torch.bfloat16)
