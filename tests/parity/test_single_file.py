"""Single files against diffusers: what we write it reads, and what it reads we read."""

import functools

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as reference
from original_layout import CHECKPOINTS, AutoencoderKL, Clip, OpenClip, UNetModel, checkpoint
from safetensors.torch import save_file
from tiny_families import FAMILIES, NARROW, POOLED, TIME_IDS, WIDE

from ldm.checkpoint import load_folder, save_model
from ldm.checkpoint.keymap import module_keys, text_keys, to_original
from ldm.checkpoint.original.detect import family_configs
from ldm.checkpoint.original.sections import TEXT, prefixes
from ldm.checkpoint.original.single import load_single
from ldm.models import build
from ldm.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


def named(module):
    """Without the prefix of text encoders, which some versions of transformers have."""
    return {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}


def assert_equal_tensors(ours, theirs):
    """In every module, by diffusers' names."""
    for part in MODULES:
        mine, other = getattr(ours, part, None), getattr(theirs, part, None)
        assert (mine is None) == (other is None), part
        if mine is not None:
            mine, other = named(mine), named(other)
            assert mine.keys() == other.keys(), part
            assert all(torch.equal(mine[name], other[name]) for name in mine), part


# A single file knows no scheduler: these hold the networks of sd2 and sdxl.
SCHEDULERS = ("sd_turbo", "sdxl_turbo", "lightning")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("lcm", *SCHEDULERS)])
def test_diffusers_reads_our_single_file(families, tmp_path, name):
    folder, theirs = families(name)
    save_model(tmp_path / "model.safetensors", load_folder(folder, RUNTIME))
    assert_equal_tensors(read_by_diffusers(tmp_path / "model.safetensors", theirs, folder), theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_our_folder(families, tmp_path, name):
    folder, theirs = families(name)
    save_model(tmp_path / "saved", load_folder(folder, RUNTIME))
    read = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert type(read) is type(theirs)
    assert_equal_tensors(read, theirs)
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert read.config[key] == value, key


def read_by_diffusers(file, pipe, folder):
    """By the class of `pipe`, with the configs in `folder` and without a safety checker."""
    beside = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
    absent = {name: None for name in beside if name in pipe.components}
    return type(pipe).from_single_file(str(file), config=str(folder), local_files_only=True, **absent)


# Tiny files as the original code would write them: the shapes of `tiny_families`.
UNET = {"channels": 16, "mult": (1, 2), "blocks": 1, "in_channels": 4}
PLAIN = UNET | {"depths": (1, 0), "middle": 1, "context": NARROW, "linear": False}
OPEN = PLAIN | {"context": WIDE, "linear": True}
XL = UNET | {
    "depths": (0, 2),
    "middle": 2,
    "context": NARROW + WIDE,
    "linear": True,
    "adm": POOLED + 6 * TIME_IDS,
}
REFINER = XL | {"context": WIDE, "adm": POOLED + 5 * TIME_IDS}
X4 = UNET | {"depths": (0, 1), "middle": 1, "context": WIDE, "linear": True, "classes": 1000}
X4 |= {"in_channels": 7, "text_only": (True, False)}
F8, F4 = {"ch": 8, "mult": (1, 2), "blocks": 1}, {"ch": 8, "mult": (1, 2, 2), "blocks": 1}


def original_file(name, rows):
    """Tensors of a family as its own code names them; `rows` of a vocabulary."""
    clip = (Clip, {"width": NARROW, "layers": 3, "inner": 2 * NARROW, "vocabulary": rows, "window": 16})
    # One layer more than SD 2 uses.
    wide = {"width": WIDE, "project": POOLED, "inner": 2 * WIDE, "vocabulary": rows, "window": 16}
    longer, open_clip = (OpenClip, {**wide, "layers": 4}), (OpenClip, {**wide, "layers": 3})
    unet = {
        "sd1": PLAIN, "inpaint": PLAIN | {"in_channels": 9}, "pix2pix": PLAIN | {"in_channels": 8},
        "sd2_v": OPEN, "inpaint_sd2": OPEN | {"in_channels": 9}, "upscaler": X4,
        "sdxl": XL, "inpaint_xl": XL | {"in_channels": 9}, "refiner": REFINER,
    }[name]  # fmt: skip
    text = {
        "clip": {"cond_stage_model.transformer": clip},
        "open_clip": {"cond_stage_model.model": longer},
        "both": {"conditioner.embedders.0.transformer": clip, "conditioner.embedders.1.model": open_clip},
        "second": {"conditioner.embedders.0.model": open_clip},
    }[FAMILIES[name].text]
    tensors = checkpoint(
        {
            "model.diffusion_model": (UNetModel, unet),
            "first_stage_model": (AutoencoderKL, F4 if name == "upscaler" else F8),
            **text,
        }
    )
    return {**tensors, "betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}


@pytest.mark.parametrize(
    "name", ["sd1", "sd2_v", "sdxl", "refiner", "inpaint", "inpaint_sd2", "inpaint_xl", "pix2pix", "upscaler"]
)
def test_an_original_file_is_read_as_diffusers_reads_it(families, tmp_path, name):
    folder, pipe = families(name)
    encoder = pipe.components.get("text_encoder") or pipe.text_encoder_2
    tensors = original_file(name, encoder.config.vocab_size)
    if FAMILIES[name].text == "open_clip":  # which it leaves out by its number in real files, 23
        for key in [key for key in tensors if ".resblocks.3." in key]:
            tensors[key.replace(".3.", ".23.")] = tensors.pop(key)
    save_file(tensors, tmp_path / "model.safetensors")
    theirs = read_by_diffusers(tmp_path / "model.safetensors", pipe, folder)
    if FAMILIES[name].text == "open_clip":
        for key in [key for key in tensors if ".resblocks.23." in key]:
            tensors[key.replace(".23.", ".3.")] = tensors.pop(key)
        save_file(tensors, tmp_path / "model.safetensors")
    ours = load_single(tmp_path / "model.safetensors", RUNTIME, config=folder, log=lambda line: None)
    assert_equal_tensors(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal_tensors(load_folder(tmp_path / "theirs", RUNTIME), ours)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_table_has_every_name_and_shape_of_the_real_files(family):
    """At full size, and against the original modules, which know of no table."""
    original = {name: tuple(t.shape) for name, t in checkpoint(CHECKPOINTS[family], "meta").items()}
    left = original.keys() - (table := our_names(family)).keys()
    assert table.items() <= original.items()
    assert len(original) == {"sd1": 1131, "sdxl": 2515}.get(family, len(original))
    for name in left:
        last = "cond_stage_model.model.transformer.resblocks.23."
        assert name.startswith(last) or name.endswith(("position_ids", "logit_scale", "text_projection"))


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_diffusers_takes_every_name_at_full_size(family):
    """Its own converters make exactly its own models' names and shapes of what our table writes."""
    base = family_configs(family)
    with torch.device("meta"):
        file = {name: torch.empty(shape) for name, shape in our_names(family).items()}
        theirs = {
            "unet": diffusers.UNet2DConditionModel.from_config(base["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(base["vae"]),
        }
    unet = reference.convert_ldm_unet_checkpoint(dict(file), dict(theirs["unet"].config))
    vae = reference.convert_ldm_vae_checkpoint(dict(file), dict(theirs["vae"].config))
    for part, converted in (("unet", unet), ("vae", vae)):
        wanted = {name: t.shape for name, t in theirs[part].state_dict().items()}
        assert {name: t.shape for name, t in converted.items()} == wanted


@functools.cache
def our_names(family):
    """{name: shape} of a file that our table writes with the published configs."""
    base, shapes = family_configs(family), {}
    for part, prefix in prefixes(family).items():
        with torch.device("meta"):
            if part in TEXT["sdxl"]:
                open_clip = prefix.endswith("model.")
                keys, tensors = text_keys(base[part], open_clip), text_tensors(base[part])
            else:
                module = build(base[part])
                keys, tensors = module_keys(module), module.state_dict()
        shapes |= {prefix + name: tuple(t.shape) for name, t in to_original(keys, tensors).items()}
    return shapes


def text_tensors(config):
    import transformers

    config = transformers.CLIPTextConfig.from_dict(config)
    model = transformers.CLIPTextModelWithProjection(config)  # has the text_model. prefix in every version
    return model.state_dict()
