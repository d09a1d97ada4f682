"""LoHa and LoKr against their closed form, what ldm reads of their files, and blocks of their own."""

import os
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_finetune import QUICK, interrupted, result, run, write_pictures
from torch import nn

from ldm.adapters.deltas import make_delta
from ldm.errors import UserError
from ldm.finetune import finetune as module
from ldm.finetune.finetune import finetune
from ldm.finetune.lora import adapter_layers, add_lora
from ldm.finetune.lora_files import save_lora
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.pipeline import Pipeline

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
KINDS = ("loha", "lokr")


def trained_by_hand(parts, **options):
    """An adapter whose tensors are none of them what they began as."""
    added = add_lora(parts, **options)
    rng = torch.Generator().manual_seed(0)
    for part in (added.unet, added.text_encoder, added.text_encoder_2):
        for p in () if part is None else part.parameters():
            if p.requires_grad:
                with torch.no_grad():
                    p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    return added


def draw(pipe):
    made = pipe("red boat", seed=0, num_inference_steps=2, height=64, width=64, output_type="latent")
    return made.images


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_model_and_a_step_has_the_gradient_of_the_closed_form(pipes, kind):
    parts = pipes("sd1").parts
    added = add_lora(parts, rank=2, alpha=3, kind=kind, conv=True, seed=1)
    layer = added.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    plain = parts.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(5, plain.in_features, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)

    learnt = {name.split(".")[0]: p for name, p in layer.named_parameters() if p.requires_grad}
    assert learnt
    assert all(p.dtype is torch.float32 for p in learnt.values())
    layer(x).square().sum().backward()
    copies = {role: p.detach().clone().requires_grad_() for role, p in learnt.items()}
    change = make_delta({**copies, "alpha": torch.tensor(3.0)}, 3 / 2)
    weight = plain.weight.detach()
    (x @ (weight + change.change(weight)).T).square().sum().backward()
    for role, p in learnt.items():
        if copies[role].grad is None:
            assert not p.grad.any()
        else:
            torch.testing.assert_close(p.grad, copies[role].grad, rtol=1e-5, atol=1e-5)
    assert any(p.grad.any() for p in learnt.values())
    assert all(not p.requires_grad for p in parts.unet.parameters())


@pytest.mark.parametrize("rank", [2, 64])  # of 64 a LoKr is two whole matrices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_is_saved_draws_as_what_is_trained(pipes, tmp_path, family, kind, rank):
    pipe = pipes(family)
    added = trained_by_hand(pipe.parts, rank=rank, alpha=rank / 4, kind=kind, conv=True, text=True)
    save_lora(added, tmp_path / "export", "style")
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["style.safetensors"]
    live = draw(Pipeline.from_parts(added, pipe.runtime))
    read = draw(pipe.with_lora(tmp_path / "export" / "style.safetensors"))
    torch.testing.assert_close(read, live, rtol=1e-4, atol=1e-4)
    assert (live - draw(pipe)).abs().max() > 0.01
    with safe_open(tmp_path / "export" / "style.safetensors", "pt") as file:
        told = file.metadata()
    assert told["ss_network_module"] == "lycoris.kohya"
    assert told["ss_network_args"] == f'{{"algo": "{kind}"}}'


@posix
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_it_goes_on_bit_for_bit(families, tmp_path, monkeypatch, kind):
    from accelerate.state import AcceleratorState

    data, model, forward = write_pictures(tmp_path / "data"), families("sd1")[0], FinetuneTask.forward
    options = {"adapter_type": kind, "max_train_steps": 3, "validation_steps": 2, "num_validation_images": 0}
    options |= {"block_lr": ("down=1e-3", "mid=1e-4"), "block_rank": ("up.0=2",)}
    for name, calls in (("whole", [0]), ("parts", [2, 0])):
        for call in calls:
            AcceleratorState._reset_state(reset_partial_state=True)
            monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
            assert run(model, data, tmp_path / name / "run", **options) == 0
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")


# --- blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_blocks_have_ranks_of_their_own_and_count_alike(pipes, tmp_path, kind):
    pipe = pipes("sd1")
    ranks = {"down": 1, "down.1": 3, "up.0": 0, "text_encoder": 5}
    added = trained_by_hand(pipe.parts, rank=4, alpha=2.0, kind=kind, ranks=ranks, text=True, conv=True)
    save_lora(added, tmp_path / "export", "style")
    tensors, found = load_file(tmp_path / "export" / "style.safetensors"), defaultdict(set)
    role = {"lora": "lora_down.weight", "loha": "hada_w1_b", "lokr": "lokr_w2_b"}[kind]
    for name, tensor in tensors.items():
        stem, _, ending = name.partition(".")
        if ending == role:
            assert float(tensors[f"{stem}.alpha"]) / len(tensor) == 0.5
            block = re.search(r"down_blocks_\d|mid_block|up_blocks_\d|te", stem)
            found[block[0]].add(len(tensor))
    expected = {"down_blocks_0": {1}, "down_blocks_1": {3}, "mid_block": {4}, "up_blocks_1": {4}, "te": {5}}
    if kind == "lokr":  # whose small layers are whole matrices, of no rank
        assert all(found[block] <= each for block, each in expected.items())
        assert sum(map(len, found.values())) > 2
    else:
        assert found == expected
    torch.testing.assert_close(
        draw(pipe.with_lora(tmp_path / "export" / "style.safetensors")),
        draw(Pipeline.from_parts(added, pipe.runtime)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.fixture
def task_of(families, tmp_path, monkeypatch):
    """A factory: the task of a fine-tuning that has not begun."""
    data = write_pictures(tmp_path / "data")

    def make(**options):
        tasks = []
        monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.train()))
        monkeypatch.setattr(module, "_report", lambda *_: None)
        given = {"model": str(families("sd1")[0]), "train_data_dir": data, "output_dir": tmp_path / "run"}
        finetune(FinetuneRecipe.model_validate(QUICK | given | options))
        return tasks[0]

    return make


def test_blocks_have_rates_of_their_own(task_of):
    rates = {"down.0": 1e-5, "down": 2e-5, "mid": 0.0, "text_encoder": 3e-5}
    given = tuple(f"{block}={rate}" for block, rate in rates.items())
    for mode in ("full", "lora"):
        task = task_of(mode=mode, train_text_encoder=True, block_lr=given, text_encoder_lr=7.0)
        names = {id(p): name for name, p in task.named_parameters()}
        seen = {}
        for group in task.parameter_groups(1e-3):
            seen |= {names[id(p)]: group["lr"] for p in group["params"]}
        assert seen.keys() == {name for name, p in task.named_parameters() if p.requires_grad}
        for name, rate in seen.items():
            part, path = name.split(".", 1)
            block = path.split(".")[0].replace("_blocks", "").replace("_block", "")
            expected = {"down": 2e-5, "mid": 0.0}.get(block, 1e-3) if part == "unet" else 3e-5
            assert rate == (1e-5 if path.startswith("down_blocks.0.") else expected), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_rank": ("middle=3",)}, "middle=3: write down.0="),
        ({"block_rank": ("mid=3", "mid=4")}, "mid=4: write down.0=.* each once"),
        ({"block_rank": ("mid=2.5",)}, "ranks are whole numbers"),
        ({"block_lr": ("mid=-1",)}, "mid=-1: give 0 or more"),
        ({"block_lr": ("mid=fast",)}, "mid=fast: fast is no number"),
        ({"block_lr": ("mid=1",), "optimizer": "prodigy"}, "prodigy finds one rate for all"),
        ({"adapter_type": "loha", "use_dora": True}, "adapter_type loha goes without use_dora"),
        ({"adapter_type": "loha", "mode": "full"}, "adapter_type is not allowed in mode full"),
    ],
)
def test_what_makes_no_sense_is_told(options, said):
    with pytest.raises(ValueError, match=said):
        FinetuneRecipe.model_validate({"train_data_dir": "data", "output_dir": "run"} | options)


def test_a_block_that_is_not_there_is_told_with_those_that_are(pipes, task_of):
    with pytest.raises(UserError, match=r"block_rank: down\.9 is not trained: there are down, down\.0, "):
        add_lora(pipes("sd1").parts, rank=2, alpha=2, ranks={"down.9": 2})
    with pytest.raises(UserError, match=r"block_lr: text_encoder is not trained: there are down, .* up\.\d$"):
        task_of(block_lr=("text_encoder=1",)).parameter_groups(1e-3)
    with pytest.raises(UserError, match="no layer of the U-Net is trained"):
        add_lora(pipes("sd1").parts, rank=2, alpha=2, ranks=dict.fromkeys(("down", "mid", "up"), 0))
    assert isinstance(pipes("sd1").parts.unet, nn.Module)


# --- looks -----------------------------------------------------------------------------------------------


def test_a_look_is_drawn_at_each_weight_and_leaves_them_as_they_were(task_of, tmp_path):
    task = task_of(validation_lora_scales=(0.0, 0.5, 1.0), rank=2).eval()
    layers = [layer for _, layer in adapter_layers(task.unet)]
    with torch.no_grad():
        for layer in layers:
            nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    before = [dict(layer.scaling) for layer in layers]
    with torch.no_grad():
        sheet = np.asarray(task.picture(tmp_path))
        assert [dict(layer.scaling) for layer in layers] == before
        alone = []
        for weight in (0.0, 0.5, 1.0):  # B times the weight, drawn plainly
            kept = [layer.lora_B["default"].weight.clone() for layer in layers]
            for layer in layers:
                layer.lora_B["default"].weight.mul_(weight)
            task.recipe = task.recipe.model_copy(update={"validation_lora_scales": (1.0,)})
            alone.append(np.asarray(task.picture(tmp_path)))
            for layer, value in zip(layers, kept, strict=True):
                layer.lora_B["default"].weight.copy_(value)
    width = alone[0].shape[1] - 2
    for i, one in enumerate(alone):
        shown = sheet[:, i * width : i * width + one.shape[1]]
        assert np.abs(shown.astype(int) - one).max() <= 1
    assert np.abs(alone[0].astype(int) - alone[2]).max() > 8


def test_early_stop_needs_pictures_that_are_held_out(task_of):
    with pytest.raises(ValueError, match="early_stop_patience goes by the held-out loss"):
        task_of(early_stop_patience=2, held_out=0)
    with pytest.raises(UserError, match="early_stop_patience: no picture is held out"):
        task_of(early_stop_patience=2, held_out=0.01)
