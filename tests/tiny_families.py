"""Tiny random pipelines of every family, made and saved by diffusers and transformers.

`make_family(name, folder)` saves one and returns diffusers' pipeline. Every weight, bias and norm is random:
fresh modules hold zeros and ones, which hide mistakes.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import diffusers
from tiny_pipeline import SCHEDULER, randomise, write_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BETAS = {name: SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule")}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NARROW, WIDE = 24, 40  # channels of the first text encoder (CLIP-L) and of the second (OpenCLIP)
POOLED, TIME_IDS = 20, 8  # channels of the second's pooled text, and of each size or crop

OPEN_CLIP = {"use_linear_projection": True, "attention_head_dim": (2, 4), "cross_attention_dim": WIDE}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": NARROW + WIDE,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_IDS,
    "projection_class_embeddings_input_dim": POOLED + 6 * TIME_IDS,
}
REFINER = XL | {
    "cross_attention_dim": WIDE,
    "projection_class_embeddings_input_dim": POOLED + 5 * TIME_IDS,
}
UPSCALER = OPEN_CLIP | {
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": (True, False),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


@dataclass(frozen=True)
class Family:
    """What makes a family: the classes' names are diffusers'."""

    pipeline: str = "StableDiffusionPipeline"
    text: str = "clip"  # "clip" (SD 1), "open_clip" (SD 2), "both" (XL), "second" (XL refiner)
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    scheduler: str = "DDIMScheduler"
    schedule: dict[str, Any] = field(default_factory=lambda: SCHEDULER)
    options: dict[str, Any] = field(default_factory=dict)  # of the pipeline


V = SCHEDULER | {"prediction_type": "v_prediction"}
TRAILING = BETAS | {"timestep_spacing": "trailing"}
PNDM = BETAS | {"skip_prk_steps": True, "steps_offset": 1}
EULER = BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
BY_4 = {  # a latent is a square of 4 x 4 pixels, and else of 2 x 2
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
F4 = BY_4 | {"scaling_factor": 0.08333}
XL_VAE = {"scaling_factor": 0.13025}
LCM_STEPS = BETAS | {"original_inference_steps": 50}
XL_V = TRAILING | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
ZERO_TERMINAL = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}

FAMILIES = {
    "sd1": Family(scheduler="PNDMScheduler", schedule=PNDM),
    "sd2": Family(text="open_clip", unet=OPEN_CLIP, scheduler="PNDMScheduler", schedule=PNDM),
    "sd2_v": Family(text="open_clip", unet=OPEN_CLIP, schedule=V),
    "sdxl": Family(
        "StableDiffusionXLPipeline", "both", XL, XL_VAE, "EulerDiscreteScheduler", EULER,
        {"force_zeros_for_empty_prompt": True},
    ),
    "refiner": Family(
        "StableDiffusionXLImg2ImgPipeline", "second", REFINER, XL_VAE, "EulerDiscreteScheduler", EULER,
        {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
    "inpaint": Family("StableDiffusionInpaintPipeline", unet={"in_channels": 9}),
    "inpaint_sd2": Family(
        "StableDiffusionInpaintPipeline", "open_clip", OPEN_CLIP | {"in_channels": 9}
    ),
    "inpaint_xl": Family(
        "StableDiffusionXLInpaintPipeline", "both", XL | {"in_channels": 9}, XL_VAE,
        "EulerDiscreteScheduler", EULER,
    ),
    "pix2pix": Family(
        "StableDiffusionInstructPix2PixPipeline", unet={"in_channels": 8},
        scheduler="EulerAncestralDiscreteScheduler", schedule=EULER,
    ),
    "shifted": Family(
        "StableDiffusionInstructPix2PixPipeline", unet={"in_channels": 8}, vae={"shift_factor": 0.3}
    ),
    "upscaler": Family("StableDiffusionUpscalePipeline", "open_clip", UPSCALER, F4, schedule=V),
    "sd_turbo": Family(
        text="open_clip", unet=OPEN_CLIP, scheduler="EulerDiscreteScheduler", schedule=TRAILING
    ),
    "sdxl_turbo": Family(
        "StableDiffusionXLPipeline", "both", XL, XL_VAE, "EulerAncestralDiscreteScheduler", TRAILING
    ),
    "lightning": Family(
        "StableDiffusionXLPipeline", "both", XL, XL_VAE, "EulerDiscreteScheduler", TRAILING
    ),
    "lcm": Family(
        "LatentConsistencyModelPipeline", unet={"time_cond_proj_dim": 16},
        scheduler="LCMScheduler", schedule=LCM_STEPS,
    ),
    "zero_terminal": Family(schedule=ZERO_TERMINAL),
    "xl_v": Family(
        "StableDiffusionXLPipeline", "both", XL, XL_VAE, "EulerDiscreteScheduler", XL_V
    ),
}  # fmt: skip


def make_family(name, folder, vae=None):
    """A diffusers pipeline of the family `name`, saved to `folder` (not yet there); returns it.

    `vae`: what its VAE has else than the family's, such as `BY_4`.
    """
    family = FAMILIES[name]
    parts = _text(family.text, folder.parent / f"{folder.name}-vocabulary")
    parts["unet"] = randomise(_unet(family.unet))
    parts["vae"] = randomise(_vae(family.vae | (vae or {})))
    parts["scheduler"] = getattr(diffusers, family.scheduler)(**family.schedule)
    if family.pipeline == "StableDiffusionUpscalePipeline":
        parts["low_res_scheduler"] = diffusers.DDPMScheduler(**BETAS)
    elif "XL" not in family.pipeline:
        parts |= NO_CHECKER
    else:
        parts["add_watermarker"] = False
    pipe = getattr(diffusers, family.pipeline)(**parts, **family.options)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def made_once(root, **changes):
    """name -> (a folder below `root`, diffusers' pipeline), made when first asked for, not to be changed."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = root / name, make_family(name, root / name, **changes)
        return made[name]

    return get


def _unet(changes):
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": NARROW,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**config | changes)


def _vae(changes):
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**config | changes)


def _text(kind, folder):
    """The text encoders and tokenizers of a pipeline, by their names there."""
    clip = {"hidden_size": NARROW, "intermediate_size": 2 * NARROW, "hidden_act": "quick_gelu"}
    open_clip = {
        "hidden_size": WIDE,
        "intermediate_size": 2 * WIDE,
        "hidden_act": "gelu",
        "projection_dim": POOLED,
    }
    first, second = write_tokenizer(folder / "1"), _pad_with_exclamation(folder / "2")
    if kind == "clip":
        return _encoder(CLIPTextModel, first, "", **clip)
    if kind == "open_clip":
        return _encoder(CLIPTextModel, second, "", **open_clip)
    # The real ones say eos_token_id = 2, which means "the highest id" to transformers.
    both = _encoder(CLIPTextModelWithProjection, second, "_2", **open_clip, eos_token_id=2)
    nothing = {"text_encoder": None, "tokenizer": None}
    return both | (_encoder(CLIPTextModel, first, "", **clip) if kind == "both" else nothing)


def _encoder(cls, tokenizer, suffix, **changes):
    config = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = randomise(cls(CLIPTextConfig(**config | changes)))
    return {f"text_encoder{suffix}": model, f"tokenizer{suffix}": tokenizer}


def _pad_with_exclamation(folder):
    """OpenCLIP pads with id 0."""
    tokenizer = write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    return type(tokenizer).from_pretrained(folder)
