"""A LoRA beside a base in 4 bits: which layers are, what they compute, and what a run keeps and saves."""

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_finetune import QUICK, arguments, both, interrupted, result, run, write_pictures
from torch import nn

from ldm.checkpoint import load_parts
from ldm.errors import UserError
from ldm.finetune.finetune import finetune
from ldm.finetune.quantise import check_quantising, quantise
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.runtime import Runtime
from ldm.train.state import newest_state

CPU = Runtime(torch.device("cpu"), torch.float32)
NF4 = {"base_model_precision": "nf4-bnb"}


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install 'ldm[bitsandbytes]'")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 4)


def accelerate_anew():
    """accelerate keeps the first training's settings for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# --- refused ---------------------------------------------------------------------------------------------


def test_devices_and_missing_libraries_are_told_in_one_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="nf4-bnb is for CUDA and processors, not for mps: leave it out"):
        check_quantising(torch.device("mps"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'ldm\[bitsandbytes\]'"):
        check_quantising(torch.device("cuda"))
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('libcudart.so.13: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"which does not load: libcudart.so.13: not found"):
        check_quantising(torch.device("cpu"))


def test_it_is_told_before_any_picture_is_read(families, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert run(families("sd1")[0], tmp_path / "nowhere", tmp_path / "run", **NF4) == 2
    assert capsys.readouterr().err.count("pip install 'ldm[bitsandbytes]'") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"mode": "full"}, "base_model_precision is not allowed in mode full: only lora can use it"),
        ({"adapter_type": "loha"}, "base_model_precision nf4-bnb goes without adapter_type"),
        ({"use_dora": True}, "base_model_precision nf4-bnb goes without use_dora"),
        ({"distributed": "fsdp"}, "base_model_precision nf4-bnb goes without distributed"),
    ],
)
def test_what_has_not_been_tried_beside_4_bits_is_refused(option, said):
    with pytest.raises(ValueError, match=said):
        FinetuneRecipe(train_data_dir="here", output_dir="there", **NF4, **option)


# --- layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_all_linear_layers_are_rounded_as_diffusers_has_it(bnb, families, family):
    """And nothing else is, nor is the given U-Net changed."""
    from diffusers import BitsAndBytesConfig, UNet2DConditionModel
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    unet = load_parts(families(family)[0], None).unet
    before = {name: (p, p.detach().clone()) for name, p in unet.named_parameters()}
    made = quantise(unet, CPU)
    theirs = UNet2DConditionModel.from_config(unet.to_config())
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    replace_with_bnb_linear(theirs, [], quantization_config=config)
    ours = {path: layer for path, layer in made.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert ours.keys() == {
        path for path, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear4bit)
    }
    assert len(ours) > 10
    for name, p in made.named_parameters():
        path, _, kind = name.rpartition(".")
        assert p is before[name][0] or (path in ours and kind == "weight")
    assert all(torch.equal(p, kept) for p, kept in before.values())

    levels = torch.tensor([  # Dettmers et al. 2023, appendix E
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ])  # fmt: skip
    for path, layer in ours.items():
        weight = unet.get_submodule(path).weight.detach()
        rounded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert layer.weight.dtype is torch.uint8
        assert layer.weight.numel() == -(-weight.numel() // 2)
        whole = weight.flatten()[: weight.numel() // 64 * 64].view(-1, 64)
        scale = whole.abs().amax(1, keepdim=True)
        expected = levels[(whole[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
        found = rounded.flatten()[: whole.numel()].view_as(whole)
        # Scales are in 8 bits, relative to the mean of 256 of them.
        assert (found - expected).norm() <= 0.02 * expected.norm(), path


def dequantised(bnb, unet):
    """The same network in plain layers of the rounded weights."""
    made = copy.deepcopy(unet)
    for path, layer in list(made.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(
                bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(
                    layer.out_features, layer.in_features
                ),
                requires_grad=False,
            )
            plain.bias = layer.bias
            made.set_submodule(path, plain)
    made.is_loaded_in_4bit = False
    return made


@pytest.fixture
def made(bnb, families, data, tmp_path, monkeypatch):
    """The task of a recipe, beside 4 bits and beside the same weights in fp32."""
    import ldm.finetune.finetune as module
    import ldm.finetune.modes as modes

    tasks = []
    monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task))
    monkeypatch.setattr(module, "_report", lambda *_: None)
    given = {"model": str(families("sdxl")[0]), "train_data_dir": data, "output_dir": tmp_path / "run"}
    recipe = FinetuneRecipe.model_validate(given | QUICK | NF4 | {"held_out": 0, "lora_conv": True})
    for change in (lambda unet: unet, lambda unet: dequantised(bnb, unet)):
        monkeypatch.setattr(
            modes, "quantise", lambda unet, runtime, change=change: change(quantise(unet, runtime))
        )
        accelerate_anew()
        finetune(recipe)
    return tasks


def test_a_step_is_that_of_the_rounded_weights_in_fp32(bnb, made):
    """Losses, gradients of the LoRA, and what AdamW makes of them."""
    from peft.tuners.lora.bnb import Linear4bit

    assert any(isinstance(module, Linear4bit) for module in made[0].modules())
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in made[1].modules())
    trained = []
    for task in made:
        weights = {name: p for name, p in task.named_parameters() if p.requires_grad}
        assert all("lora_" in name and p.dtype is torch.float32 for name, p in weights.items())
        for name, p in weights.items():
            if "lora_B" in name:  # else those of A are 0 at first
                torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        batch = task.batch(torch.Generator().manual_seed(0), 1, 0)
        loss, _ = task.train()(batch)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in weights.items()}
        torch.optim.AdamW(weights.values(), lr=1e-3, eps=1e-6).step()
        trained.append((loss.detach(), grads, weights))
    (loss, grads, weights), (expected, their_grads, their_weights) = trained
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert grads.keys() == their_grads.keys()
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-4
    for name in grads:
        assert (grads[name] - their_grads[name]).norm() <= 1e-5 * their_grads[name].norm() + 1e-9, name
        torch.testing.assert_close(weights[name], their_weights[name], rtol=1e-5, atol=1e-5)


def test_looking_leaves_the_weights_as_they_are_on_any_processor(bnb, families, monkeypatch):
    """bitsandbytes would lay them out for drawing where there is AVX512-BF16, and no gradient came back."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    unet = quantise(load_parts(families("sd1")[0], None).unet, CPU).eval()
    (layer, *_) = (each for each in unet.modules() if isinstance(each, bnb.nn.Linear4bit))
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer(torch.ones(1, layer.in_features))
    assert torch.equal(layer.weight.data, before)
    x = torch.ones(1, layer.in_features, requires_grad=True)
    layer.train()(x).sum().backward()
    assert x.grad is not None


# --- a run -----------------------------------------------------------------------------------------------


def test_a_run_keeps_the_lora_alone_and_goes_on_bit_for_bit(
    bnb, families, data, tmp_path, monkeypatch, capsys
):
    options = NF4 | {"max_train_steps": 3, "held_out": 0.25, "validation_steps": 2, "lora_dropout": 0.1}
    options |= {"mixed_precision": "bf16"}
    assert run(families("sd1")[0], data, tmp_path / "whole" / "run", **options) == 0
    said = capsys.readouterr().out
    assert "linear layers of its U-Net in 4 bits" in said
    state = load_file(newest_state(tmp_path / "whole" / "run") / "weights.safetensors")
    assert all("lora_" in name and value.dtype is torch.float32 for name, value in state.items())
    forward = FinetuneTask.forward
    for call in (2, 0):
        accelerate_anew()
        monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
        assert run(families("sd1")[0], data, tmp_path / "parts" / "run", **options) == 0
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")
    accelerate_anew()
    changed = options | {"base_model_precision": "no_change"}
    assert run(families("sd1")[0], data, tmp_path / "whole" / "run", **changed) == 2
    assert "another recipe: base_model_precision nf4-bnb -> no_change" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_what_one_does(bnb, families, data, tmp_path):
    options = NF4 | {"held_out": 0, "num_validation_images": 0}
    argv = arguments(families("sd1")[0], data, tmp_path / "two", **options)
    assert both(tmp_path / "logs", argv) == [0, 0], (tmp_path / "logs/output-0.txt").read_text()
    assert run(families("sd1")[0], data, tmp_path / "one", gradient_accumulation_steps=2, **options) == 0
    ours, theirs = (
        load_file(newest_state(tmp_path / name) / "weights.safetensors") for name in ("two", "one")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
