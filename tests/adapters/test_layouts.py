"""The layouts that other programs write: each draws what the same LoRA draws in diffusers' spelling."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import to_kohya
from tiny_families import NARROW, WIDE

import ldm
from ldm.checkpoint.keymap import unet_keys


def respell(tensors, rename):
    """Each name as `rename` has it: of the stem, and "A" or "B"."""
    renamed = {}
    for name, tensor in tensors.items():
        stem, which, _ = name.rsplit(".", 2)
        renamed[rename(stem, which.removeprefix("lora_"))] = tensor
    assert renamed.keys() != tensors.keys()
    return renamed


OLD = {"A": "down", "B": "up"}


def without_zero(stem, which):
    return f"{stem.replace('to_out.0', 'to_out')}.lora.{OLD[which]}.weight"


def without_processor(stem, which):
    if ".attn" not in stem:
        return f"{stem}.lora.{OLD[which]}.weight"
    return f"{stem.replace('to_out.0', 'to_out')}_lora.{OLD[which]}.weight"


def refiner_first(stem, which):
    layer = stem.removeprefix("text_encoder_2.").removeprefix("text_model.")
    return f"{stem if layer == stem else f'text_encoder.text_model.{layer}'}.lora_{which}.weight"


def comfy(stem, which):
    part, _, path = stem.partition(".")
    clip = {"text_encoder_2": "clip_g", "text_encoder": "clip_l"}.get(part)
    if clip is None:
        return f"diffusion_model.{path}.lora_{OLD[which]}.weight"
    path = path.removeprefix("text_model.")
    return f"text_encoders.{clip}.transformer.text_model.{path}.lora_{OLD[which]}.weight"


LAYOUTS = {
    "adapter_name": lambda stem, which: f"{stem}.lora_{which}.default.weight",
    "another_adapter_name": lambda stem, which: f"{stem}.lora_{which}.default_0.weight",
    "no_weight": lambda stem, which: f"{stem}.lora_{which}",
    "adapter_name_no_weight": lambda stem, which: f"{stem}.lora_{which}.style",
    "without_zero": without_zero,
    "without_processor": without_processor,
    "comfy": comfy,
}
UNET_ONLY = {
    "peft_raw": lambda stem, which: (
        f"base_model.model.{stem.removeprefix('unet.')}.lora_{which}.default.weight"
    ),
    "lycoris": lambda stem, which: (
        f"lycoris_{stem.removeprefix('unet.').replace('.', '_')}.lora_{OLD[which]}.weight"
    ),
}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_spelling(family, tmp_path, name, layout):
    made = family(name)
    save_file(respell(made.tensors, LAYOUTS[layout]), tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made.plain)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", UNET_ONLY)
def test_another_spelling_of_the_unet(family, tmp_path, name, layout):
    made = family(name)
    unet = {name: tensor for name, tensor in made.tensors.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "plain.safetensors")
    save_file(respell(unet, UNET_ONLY[layout]), tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made(tmp_path / "plain.safetensors"))


def test_the_refiners_only_encoder_is_the_first_to_some(family, tmp_path):
    made = family("refiner")
    save_file(respell(made.tensors, refiner_first), tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made.plain)


def original(pipe, prefix):
    """Renames the U-Net's layers as single files have them."""

    def rename(stem, which):
        (key,) = unet_keys(pipe.unet.config, [f"{stem.removeprefix('unet.')}.weight"])
        return f"{prefix}{key.original.removesuffix('.weight')}.lora_{OLD[which]}.weight"

    return rename


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_names_of_checkpoints(family, tmp_path, name):
    made = family(name)
    unet = {name: tensor for name, tensor in made.tensors.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "plain.safetensors")
    renamed = respell(unet, original(made.pipe, "model.diffusion_model."))
    save_file(renamed, tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made(tmp_path / "plain.safetensors"))


def test_alpha_of_processors(family, tmp_path):
    made = family("sd1")
    attention = {name: tensor for name, tensor in made.tensors.items() if ".attn" in name}
    save_file(attention, tmp_path / "plain.safetensors")
    to_kohya(tmp_path / "plain.safetensors", tmp_path / "kohya.safetensors", alpha=1.5)
    old = {}
    for name, tensor in attention.items():
        head, _, last = name.replace("to_out.0", "to_out").rsplit(".", 2)[0].rpartition(".")
        old[f"{head}.processor.{last}_lora.{OLD[name.split('lora_')[1][0]]}.weight"] = tensor
        old[f"{head}.processor.{last}_lora.alpha"] = torch.tensor(1.5)
    save_file(old, tmp_path / "old.safetensors")
    assert torch.equal(made(tmp_path / "old.safetensors"), made(tmp_path / "kohya.safetensors"))


def test_both_spellings_at_once(family, tmp_path):
    """So that every program finds one; but they must be the same."""
    made = family("sdxl")
    renamed = respell(made.tensors, LAYOUTS["comfy"])
    both = made.tensors | {name: tensor.clone() for name, tensor in renamed.items()}
    save_file(both, tmp_path / "both.safetensors")
    assert torch.equal(made(tmp_path / "both.safetensors"), made.plain)
    (report,) = made.pipe.with_lora(tmp_path / "both.safetensors").adapted.reports
    assert report.layers == len(made.tensors) // 2
    both[next(iter(renamed))].mul_(2)
    save_file(both, tmp_path / "different.safetensors")
    with pytest.raises(ldm.UserError, match="twice, in two spellings, and not the same"):
        made(tmp_path / "different.safetensors")


def test_two_adapters_in_one_file(family, tmp_path):
    made = family("sd1")
    both = respell(made.tensors, LAYOUTS["adapter_name"]) | respell(
        {name: tensor.clone() for name, tensor in made.tensors.items()}, LAYOUTS["adapter_name_no_weight"]
    )
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(ldm.UserError, match="holds 2 adapters, default and style") as caught:
        made(tmp_path / "both.safetensors")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_one_byte(family, tmp_path, dtype, suffix):
    """A LoRA in float8 is drawn as its copy in fp32 is; NaN is found there too."""
    made = family("sd1")
    to_kohya(save(made.tensors, tmp_path / "plain.safetensors"), tmp_path / "kohya.safetensors", alpha=2)
    small = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "kohya.safetensors").items()}
    save(small, tmp_path / f"small{suffix}")
    save({name: tensor.float() for name, tensor in small.items()}, tmp_path / "wide.safetensors")
    for fused in (False, True):
        picture = made(tmp_path / f"small{suffix}", fused=fused)
        assert torch.equal(picture, made(tmp_path / "wide.safetensors", fused=fused))
    small[sorted(small)[-1]] = torch.full((3, 4), float("nan")).to(dtype)
    save(small, tmp_path / f"nan{suffix}")
    with pytest.raises(ldm.UserError, match="NaN"):
        made(tmp_path / f"nan{suffix}")


def save(tensors, path):
    (torch.save if path.suffix == ".pt" else save_file)(tensors, path)
    return path


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_word_within_a_lora(family, tmp_path, name):
    """OneTrainer's: both act, as the LoRA and a file of the word do."""
    made = family(name)
    vectors = {"clip_l": torch.randn(2, NARROW), "clip_g": torch.randn(2, WIDE)}
    if name == "sd1":
        vectors = {"string_to_param.*": vectors["clip_l"]}
    save_file(vectors, tmp_path / "mycat.safetensors")
    save_file(made.tensors, tmp_path / "plain.safetensors")
    bundle = {f"bundle_emb.mycat.{key}": tensor for key, tensor in vectors.items()}
    save_file(made.tensors | bundle, tmp_path / "both.safetensors")
    pipe = made.pipe.with_lora(tmp_path / "both.safetensors", 0.8)
    apart = made.pipe.with_lora(tmp_path / "plain.safetensors", 0.8)
    apart = apart.with_embedding(tmp_path / "mycat.safetensors")
    draw = made.draw | {"prompt": "a mycat boat"}
    assert torch.equal(pipe(**draw).images, apart(**draw).images)
    assert not torch.equal(pipe(**draw).images, made(tmp_path / "plain.safetensors", prompt="a mycat boat"))
    assert str(pipe.adapted.reports[0]).endswith("; for what it learnt, write mycat in the prompt")
    assert not pipe.base.adapted.loras
    # By the word's own file too, it would be there twice.
    with pytest.raises(ldm.UserError, match="'mycat' already; choose a name"):
        pipe.with_embedding(tmp_path / "mycat.safetensors")
    pipe.with_embedding(tmp_path / "mycat.safetensors", "other")
