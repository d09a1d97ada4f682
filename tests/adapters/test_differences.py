"""Files of plain sums: differences of weights, biases and norms, beside a LoRA or alone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_families import NARROW

import ldm
from ldm.checkpoint.keymap import unet_keys


def edited(peer, changes, weight):
    """diffusers' pipeline with changes of weights and biases, by part and name, added to copies."""
    parts = {part: copy.deepcopy(getattr(peer, part)) for part in {part for part, _ in changes}}
    with torch.no_grad():
        for (part, name), change in changes.items():
            parts[part].get_parameter(name).add_(
                weight * change.reshape(parts[part].get_parameter(name).shape)
            )
    return parts


def check_parts(pipe, parts):
    """The U-Net and the text encoder against diffusers' and transformers'."""
    torch.manual_seed(5)
    sample, context, ids = torch.randn(1, 4, 8, 8), torch.randn(1, 7, NARROW), torch.randint(0, 500, (2, 16))
    with torch.no_grad():
        if "unet" in parts:
            theirs, ours = parts["unet"](sample, 301, context).sample, pipe.unet(sample, 301, context)
            assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
        if "text_encoder" in parts:
            theirs, ours = parts["text_encoder"](ids)[0], pipe.parts.text_encoder(ids)[0]
            assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


def text_path(peer, path):
    """transformers before 5.6 has `text_model.` there."""
    names = dict(peer.text_encoder.named_parameters())
    return path if f"{path}.weight" in names else f"text_model.{path}"


def random(peer, part, path, kind):
    shape = getattr(peer, part).get_parameter(f"{path}.{kind}").shape
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(path)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spelling", ["lycoris", "comfy", "dots"])
def test_differences_are_added(family, tmp_path, spelling, fused):
    """Of weights, biases and norms, in the names of LyCORIS and of ComfyUI's extracts."""
    made = family("sd1")
    block = "down_blocks.0.attentions.0"
    paths = [
        ("unet", "conv_in"),
        ("unet", "down_blocks.0.resnets.0.conv2"),
        ("unet", "down_blocks.0.resnets.0.norm1"),
        ("unet", f"{block}.transformer_blocks.0.attn2.to_k"),  # has no bias
        ("unet", f"{block}.transformer_blocks.0.norm2"),
        ("unet", "conv_norm_out"),
        ("text_encoder", text_path(made.peer, "encoder.layers.1.layer_norm2")),
        ("text_encoder", text_path(made.peer, "encoder.layers.0.mlp.fc1")),
        ("text_encoder", text_path(made.peer, "final_layer_norm")),
        ("text_encoder", text_path(made.peer, "embeddings.position_embedding")),
    ]
    changes, tensors = {}, {}
    for part, path in paths:
        norm = "norm" in path.rpartition(".")[2]
        for kind in ("weight",) if path.endswith(("to_k", "embedding")) else ("weight", "bias"):
            change = changes[part, f"{path}.{kind}"] = random(made.peer, part, path, kind)
            called = {"weight": "diff", "bias": "diff_b"}[kind]
            if norm and spelling == "lycoris":
                called = {"weight": "w_norm", "bias": "b_norm"}[kind]
            tensors[f"{stem_of(made.pipe, part, path, spelling)}.{called}"] = change
    save_file(tensors, tmp_path / "full.safetensors")
    adapted = made.pipe.with_lora(tmp_path / "full.safetensors", 0.7)
    check_parts(adapted.fuse() if fused else adapted, edited(made.peer, changes, 0.7))
    (report,) = adapted.adapted.reports
    assert report.kinds == ("difference",)
    assert report.layers == len(paths)
    # The base is as it was, and shares all that is not changed.
    check_parts(made.pipe, {"unet": made.peer.unet, "text_encoder": made.peer.text_encoder})
    own, changed = (each.unet.state_dict(keep_vars=True) for each in (made.pipe, adapted))
    assert {name for name in own if own[name] is not changed[name]} == {
        name for part, name in changes if part == "unet"
    }


def stem_of(pipe, part, path, spelling):
    bare = path.removeprefix("text_model.")
    if part == "text_encoder":
        flat = f"lora_te_text_model_{bare.replace('.', '_')}"
        names = {
            "comfy": f"text_encoders.clip_l.transformer.text_model.{bare}",
            "dots": f"text_encoder.{bare}",
        }
        return names.get(spelling, flat)
    (key,) = unet_keys(pipe.unet.config, [f"{path}.weight"])
    stored = key.original.removesuffix(".weight")
    names = {"comfy": f"diffusion_model.{stored}", "dots": f"unet.{path}"}
    return names.get(spelling, f"lora_unet_{path.replace('.', '_')}")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", [2, 4])
def test_the_bias_of_pefts_b(family, tmp_path, rank, fused):
    """It is scaled by alpha / rank as B is, whether alpha is in the config or in kohya's names."""
    made = family("sd1")
    targets = ["conv1", "ff.net.2", "time_emb_proj", "proj_in"]
    config = LoraConfig(r=rank, lora_alpha=3, lora_bias=True, init_lora_weights=False, target_modules=targets)
    torch.manual_seed(4)
    model = get_peft_model(copy.deepcopy(made.peer.unet), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "peft")
    tensors = get_peft_model_state_dict(model)
    assert any(name.endswith("lora_B.bias") for name in tensors)
    kohya = {}
    for name, tensor in tensors.items():
        stem, called, kind = name.removeprefix("base_model.model.").rsplit(".", 2)
        stem = f"lora_unet_{stem.replace('.', '_')}"
        kohya[f"{stem}.{'lora_down' if called == 'lora_A' else 'lora_up'}.{kind}"] = tensor.contiguous()
        kohya[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    for file in (tmp_path / "peft", tmp_path / "kohya.safetensors"):
        adapted = made.pipe.with_lora(file)
        check_parts(adapted.fuse() if fused else adapted, {"unet": model.base_model.model})


@pytest.mark.parametrize("fused", [False, True])
def test_a_difference_of_a_bias_beside_a_lora(family, tmp_path, fused):
    """As ComfyUI's extracts have it; alpha / rank is not the bias's."""
    made, path = family("sd1"), "down_blocks.0.resnets.0.conv1"
    up, down, bias = torch.randn(16, 2), torch.randn(2, 16, 3, 3) / 9, torch.randn(16)
    stem = stem_of(made.pipe, "unet", path, "comfy")
    tensors = {"lora_up.weight": up[:, :, None, None], "lora_down.weight": down, "diff_b": bias}
    tensors["alpha"] = torch.tensor(1.0)
    save_file({f"{stem}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapted = made.pipe.with_lora(tmp_path / "a.safetensors", 0.6)
    weight = 0.5 * (up @ down.flatten(1)).reshape(16, 16, 3, 3)
    changes = {("unet", f"{path}.weight"): weight, ("unet", f"{path}.bias"): bias}
    check_parts(adapted.fuse() if fused else adapted, edited(made.peer, changes, 0.6))
    assert adapted.unet.get_parameter(f"{path}.weight") is made.pipe.unet.get_parameter(f"{path}.weight")


def test_a_difference_of_tokens_beside_new_words(family, tmp_path):
    made = family("sd1")
    old = made.pipe.parts.text_encoder.get_input_embeddings().weight
    change, rows = torch.randn(old.shape), torch.randn(2, NARROW)
    stem = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"
    save_file({f"{stem}.diff": change}, tmp_path / "full.safetensors")
    save_file({"<cat>": rows}, tmp_path / "cat.safetensors")
    one = made.pipe.with_lora(tmp_path / "full.safetensors", 0.5).with_embedding(tmp_path / "cat.safetensors")
    two = made.pipe.with_embedding(tmp_path / "cat.safetensors").with_lora(tmp_path / "full.safetensors", 0.5)
    for pipe in (one, two):
        new = pipe.parts.text_encoder.get_input_embeddings().weight
        assert torch.equal(new, torch.cat([old + 0.5 * change, rows]))


def test_what_is_saved_has_the_sums(family, tmp_path):
    made = family("sd1")
    stem = "lora_unet_conv_norm_out"
    save_file(
        {f"{stem}.w_norm": torch.ones(16), f"{stem}.b_norm": torch.ones(16)}, tmp_path / "a.safetensors"
    )
    adapted = made.pipe.with_lora(tmp_path / "a.safetensors", 0.5)
    adapted.save(tmp_path / "saved")
    again = ldm.load(tmp_path / "saved", dtype="fp32", device="cpu")
    assert torch.equal(again(**made.draw).images, adapted(**made.draw).images)
    assert torch.equal(again.unet.conv_norm_out.bias, made.pipe.unet.conv_norm_out.bias + 0.5)
    assert torch.equal(adapted.base(**made.draw).images, made.pipe(**made.draw).images)
