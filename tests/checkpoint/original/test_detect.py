"""What a single file is, from names and shapes alone, from marks and metadata, or by a stated guess."""

import json
from pathlib import Path

import pytest
import torch
from original_layout import CHECKPOINTS, AutoencoderKL, Clip, OpenClip, UNetModel, checkpoint
from safetensors.torch import save_file

from ldm.checkpoint.original.detect import detect, family_configs, own_configs
from ldm.checkpoint.original.sections import Single, open_single, prefixes
from ldm.errors import UserError

# Shapes of no published model: two levels of 64 and 128 channels, two encoders of one head.
SMALL = {"channels": 64, "mult": (1, 2), "depths": (1, 0), "middle": 1, "context": 64, "in_channels": 4}
SMALL |= {"linear": False, "blocks": 1}
VAE = {"ch": 32, "mult": (1, 2), "blocks": 1}
TEXT = {"width": 64, "layers": 2, "vocabulary": 50, "window": 9}


def small(unet=None, text="cond_stage_model.transformer", **extra):
    """A small file's tensors: of SD 1, or with changes to the U-Net and the text encoder's place."""
    encoder = (OpenClip, {**TEXT, "project": 48}) if text.endswith("model") else (Clip, TEXT)
    parts = {"model.diffusion_model": (UNetModel, SMALL | (unet or {}))}
    parts |= {"first_stage_model": (AutoencoderKL, VAE), text: encoder}
    return checkpoint(parts) | extra


def detected(tmp_path, tensors, metadata=None, name="model", **options):
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path, metadata)
    return detect(open_single(path), options.pop("given", {}), **options)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_real_shapes_give_the_published_configs(family):
    sections = {}
    for name, tensor in checkpoint(CHECKPOINTS[family], "meta").items():
        part = next(part for part, prefix in prefixes(family).items() if name.startswith(prefix))
        sections.setdefault(part, {})[name.removeprefix(prefixes(family)[part])] = tensor
    file = Single(Path("model.safetensors"), family, sections, {}, {}, ())
    published = family_configs(family)
    found = detect(file, {}, published["prediction_type"])
    for part in prefixes(family):
        assert found.configs[part] == published[part]


OPEN = {"linear": True, "context": 64}
KINDS = {
    "Stable Diffusion 1": small,
    "Stable Diffusion 1 inpainting": lambda: small({"in_channels": 9}),
    "Stable Diffusion 1 instruct-pix2pix": lambda: small({"in_channels": 8}),
    "Stable Diffusion 2": lambda: small(OPEN, "cond_stage_model.model"),
    "Stable Diffusion 2 inpainting": lambda: small(OPEN | {"in_channels": 9}, "cond_stage_model.model"),
    "Stable Diffusion 2 depth": lambda: small(OPEN | {"in_channels": 5}, "cond_stage_model.model"),
    "Stable Diffusion x4 upscaler": lambda: small(
        OPEN | {"in_channels": 7, "classes": 10}, "cond_stage_model.model"
    ),
    "Stable Diffusion XL": lambda: small(OPEN | {"adm": 96}, "conditioner.embedders.1.model"),
    "Stable Diffusion XL inpainting": lambda: small(
        OPEN | {"adm": 96, "in_channels": 9}, "conditioner.embedders.1.model"
    ),
    "Stable Diffusion XL refiner": lambda: small(OPEN | {"adm": 96}, "conditioner.embedders.0.model"),
    "Stable Diffusion 1 LCM": lambda: small(
        **{"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(64, 24)}
    ),
}


@pytest.mark.parametrize("title", KINDS)
def test_families_and_kinds(tmp_path, title):
    found = detected(tmp_path, KINDS[title]())
    assert found.title == title
    assert found.configs["unet"]["block_out_channels"] == [64, 128]
    assert found.configs["vae"]["block_out_channels"] == [32, 64]


@pytest.mark.parametrize(
    ("linear", "adm", "family"), [(False, None, "1"), (True, None, "2"), (True, 96, "XL")]
)
def test_a_unet_alone_tells_its_family(tmp_path, linear, adm, family):
    unet = SMALL | {"linear": linear, "adm": adm}
    found = detected(tmp_path, checkpoint({"model.diffusion_model": (UNetModel, unet)}))
    assert found.title == f"Stable Diffusion {family}"


def test_the_kind_follows_from_the_channels_of_the_latents(tmp_path):
    """As many as the latents again is instruct-pix2pix, whether they have 4 channels or 16."""
    wide = {
        "model.diffusion_model": (UNetModel, SMALL | {"in_channels": 32}),
        "first_stage_model": (AutoencoderKL, VAE | {"z": 16}),
        "cond_stage_model.transformer": (Clip, TEXT),
    }
    found = detected(tmp_path, checkpoint(wide))
    assert found.title == "Stable Diffusion 1 instruct-pix2pix"
    assert found.configs["scheduler"]["_class_name"] == "EulerAncestralDiscreteScheduler"
    wide["model.diffusion_model"] = (UNetModel, SMALL | {"in_channels": 8})
    wide["first_stage_model"] = (AutoencoderKL, VAE | {"z": 8})
    found = detected(tmp_path, checkpoint(wide), given={"vae": found.configs["vae"] | {"latent_channels": 8}})
    assert found.configs["scheduler"]["_class_name"] == "PNDMScheduler"


def test_schedulers_of_kinds(tmp_path):
    def scheduler(title):
        return detected(tmp_path, KINDS[title]()).configs["scheduler"]

    assert scheduler("Stable Diffusion 1")["_class_name"] == "PNDMScheduler"
    assert (
        scheduler("Stable Diffusion 1 instruct-pix2pix")["_class_name"] == "EulerAncestralDiscreteScheduler"
    )
    assert scheduler("Stable Diffusion 1 LCM")["_class_name"] == "LCMScheduler"
    assert scheduler("Stable Diffusion XL")["_class_name"] == "EulerDiscreteScheduler"
    upscaler = detected(tmp_path, KINDS["Stable Diffusion x4 upscaler"]())
    assert upscaler.configs["low_res_scheduler"]["beta_end"] == 0.02
    assert upscaler.configs["scheduler"]["prediction_type"] == "v_prediction"
    depth = detected(tmp_path, KINDS["Stable Diffusion 2 depth"]()).configs
    assert (depth["scheduler"]["prediction_type"], depth["unet"]["sample_size"]) == ("epsilon", 64)


# --- the prediction type ---------------------------------------------------------------------------------


def prediction(found):
    return found.configs["scheduler"]["prediction_type"]


def test_marks_say_v_and_zero_terminal_snr(tmp_path):
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    xl = OPEN | {"adm": 96}
    found = detected(tmp_path, small(xl, "conditioner.embedders.1.model", **marks))
    assert prediction(found) == "v_prediction"
    assert found.notes == ()
    scheduler = found.configs["scheduler"]
    assert scheduler["rescale_betas_zero_snr"]
    assert scheduler["timestep_spacing"] == "trailing"
    one = detected(tmp_path, small(**marks)).configs["scheduler"]
    assert one["_class_name"] == "DDIMScheduler"  # PNDM cannot


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ],
)
def test_metadata_says_it(tmp_path, metadata, told):
    found = detected(tmp_path, small(OPEN, "cond_stage_model.model"), metadata)
    assert prediction(found) == told
    assert found.notes == ()
    assert found.configs["unet"]["sample_size"] == (96 if told == "v_prediction" else 64)


def test_a_guess_is_said_with_the_way_out(tmp_path):
    found = detected(tmp_path, small())
    assert prediction(found) == "epsilon"
    (note,) = found.notes
    assert "epsilon is assumed" in note
    assert "--prediction-type v_prediction" in note


def test_of_sd2_a_bias_decides(tmp_path):
    """As in ComfyUI: it spreads wider in the models for 768 pixels, which predict v."""
    # The published depth, so that the block is there; narrow, so that it is quick.
    deep = {"mult": (1, 1, 1, 1), "depths": (1, 1, 1, 0), "blocks": 2} | OPEN
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors = small(deep, "cond_stage_model.model")
    wide, narrow = "v_prediction", "epsilon"
    for spread, told in ((0.12, wide), (0.095, wide), (0.085, narrow), (0.05, narrow)):
        bias = tensors[name] - tensors[name].mean()
        tensors[name] = bias / bias.std(unbiased=False) * spread
        found = detected(tmp_path, tensors)
        assert prediction(found) == told
        assert "spread of one bias" in found.notes[0]
    inpainting = detected(tmp_path, KINDS["Stable Diffusion 2 inpainting"]())
    assert prediction(inpainting) == "epsilon"


def test_what_is_asked_wins_over_marks(tmp_path):
    tensors = small(v_pred=torch.tensor([]))
    found = detected(tmp_path, tensors, prediction_type="epsilon")
    assert prediction(found) == "epsilon"
    assert found.notes == ()


@pytest.mark.parametrize("name", ["sd_xl_turbo_1.0_fp16", "sdxl_lightning_4step"])
def test_few_step_models_are_known_by_name_only(tmp_path, name):
    tensors = small(OPEN | {"adm": 96}, "conditioner.embedders.1.model")
    found = detected(tmp_path, tensors, name=name)
    assert found.configs["scheduler"]["timestep_spacing"] == "trailing"
    assert (found.defaults.num_inference_steps, found.defaults.guidance_scale) == (4, 1.0)
    assert any("by its name" in note for note in found.notes)
    assert found.configs["unet"]["sample_size"] == (64 if "turbo" in name else 128)


# --- faults ----------------------------------------------------------------------------------------------


def test_given_configs_are_believed(tmp_path):
    given = {"unet": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "norm_num_groups": 8}}
    found = detected(tmp_path, small(), given=given)
    assert found.configs["unet"] == given["unet"]


def test_faults_name_the_tensor(tmp_path):
    with pytest.raises(UserError, match="6 input channels"):
        detected(tmp_path, small({"in_channels": 6}))
    tensors = small()
    del tensors["model.diffusion_model.input_blocks.1.0.out_layers.3.weight"]
    with pytest.raises(UserError, match=r"model\.diffusion_model\.input_blocks\.1\.0.* is missing"):
        detected(tmp_path, tensors)


@pytest.mark.parametrize("value", ["{", "[]", json.dumps({"unet": 3})])
def test_a_damaged_header_is_an_error(tmp_path, value):
    with pytest.raises(UserError, match=r"ldm\.config is damaged"):
        own_configs({"ldm.config": value}, tmp_path / "x.safetensors")
