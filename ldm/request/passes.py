"""Requests that follow from a request: of its second pass at a larger size, and of a refiner's last steps.

Each holds what is not as in the first; here the whole is made of both, and that of the whole. It knows of no
model but what it is told.
"""

from __future__ import annotations

import math

from ldm.errors import UserError
from ldm.request import NOTED, OF_MASKS, Request
from ldm.request.fields import MAX_SIDE

HIRES_SCALE = 2.0
HIRES_STRENGTH = 0.7  # as in A1111
SWITCH_AT = 0.8  # SDXL's refiner knows the last 200 of 1000 noise levels: Podell et al. 2023, section 2.5

# What of a pass belongs together: who names the first says the others too, if only by silence.
TOGETHER = {
    "num_inference_steps": ("timesteps", "sigmas"),
    "timesteps": ("num_inference_steps", "sigmas"),
    "sigmas": ("num_inference_steps", "timesteps"),
    "sampler": ("spacing", "eta", "sampler_options"),
    "prompt": ("prompt_2",),
    "negative_prompt": ("negative_prompt_2",),
}
# What a second pass always says: the rest only where it is not as in the first.
OWN = ("height", "width", "strength", *TOGETHER["timesteps"], "timesteps", "sampler", *TOGETHER["sampler"])
# What it has none of, whatever the first has.
FIRST_ONLY = (
    *("image", "image_sha256", "mask_image", "mask_image_sha256", "target_prompt", "upscaling", "not_kept"),
    *("hires", "hires_scale", "hires_upscaler", "hires_upscaler_sha256", "denoising_start", "denoising_end"),
    *("refiner_switch_at", "refining", "resize_mode", *OF_MASKS),
)
# What a refiner draws as the first model does.
REFINED = (
    *(
        "prompt",
        "negative_prompt",
        "prompt_grammar",
        "drawn_as",
        "height",
        "width",
        "num_inference_steps",
        "timesteps",
    ),
    *("sigmas", "sampler", "spacing", "eta", "guidance_scale", "guidance_rescale", "original_size"),
    *("crops_coords_top_left", "negative_original_size", "negative_crops_coords_top_left", "tiling"),
    *("tile_size", "tile_overlap", "sampler_options", "noise", "noise_seed_delta"),
    *("guidance", "guidance_interval", "cache_interval", "cache_branch_id", "token_merging_ratio"),
    *("regions", "freeu"),
)
_DEFAULTS = {name: field.default for name, field in Request.model_fields.items()}


def hires_request(request: Request, factor: int) -> Request:
    """The second pass of a resolved request, as a request of its own. Raises UserError for its size.

    Args:
        factor: between pixels and latents: of the model, whose sizes are multiples of it.
    """
    asked = request.hires or Request()
    said = {name: value for name in _DEFAULTS if (value := getattr(asked, name)) != _DEFAULTS[name]}
    silent = {other: _DEFAULTS[other] for name in said for other in TOGETHER.get(name, ())}
    without = {name: _DEFAULTS[name] for name in FIRST_ONLY}
    fields = {**dict(request), "strength": HIRES_STRENGTH, **silent, **said, **without}
    height, width = _hires_size(request, factor)
    return Request(**{**fields, "seeds": request.seeds, "height": height, "width": width})


def hires_of(second: Request, first: Request) -> Request:
    """What a request says of its second pass: `hires_request` makes `second` of it, resolved as it is."""
    differ = [name for name in _DEFAULTS if getattr(second, name) != getattr(first, name)]
    kept = {*OWN, *differ} - {*FIRST_ONLY, *NOTED, "seeds"} | {"loras", "embeddings"} & {*differ}
    return Request(**{name: getattr(second, name) for name in kept})


def _hires_size(request: Request, factor: int) -> tuple[int, int]:
    """(height, width) of the second pass: that asked for, or the multiples nearest to the scale."""
    asked, unit, first = request.hires or Request(), math.lcm(8, factor), request.size
    scale = HIRES_SCALE if request.hires_scale is None else request.hires_scale
    height, width = (max(unit, round(side * scale / unit) * unit) for side in first)
    if asked.height is not None and asked.width is not None:
        if request.hires_scale is not None and (height, width) != asked.size:
            raise UserError(
                f"hires_scale {scale:g} makes {width}x{height} pixels, and hires asks for "
                f"{asked.width}x{asked.height}: give one of them"
            )
        return asked.size
    if asked.height is not None or asked.width is not None:
        raise UserError("hires has a height or a width alone: give both, or hires_scale")
    if max(height, width) > MAX_SIDE:
        most = math.floor(MAX_SIDE / max(first) * 100) / 100
        raise UserError(
            f"hires_scale {scale:g} of {first[1]}x{first[0]} pixels makes {width}x{height}, too many: "
            f"give at most {most:g}, or smaller sides"
        )
    return height, width


def refining_request(request: Request, second_encoder: bool) -> Request:
    """What a refiner draws of a picture of a resolved request, as a request of its own.

    Args:
        second_encoder: whether its text encoder is the second of others alone, as in SDXL's refiner.
    """
    asked = request.refining or Request()
    said = {name: value for name in _DEFAULTS if (value := getattr(asked, name)) != _DEFAULTS[name]}
    shared = {name: getattr(request, name) for name in REFINED}
    if second_encoder:
        negative = request.negative_prompt_2 or request.negative_prompt
        shared |= {"prompt": request.prompt_2 or request.prompt, "negative_prompt": negative}
    if request.tile_size is not None and request.tile_size > max(request.size):  # of a second pass
        shared |= {"tile_size": None, "tile_overlap": None}
    begins = {"seeds": request.seeds, "denoising_start": request.refiner_switch_at}
    return Request(**{**shared, **said, **begins, "model": None, "model_hash": None})


def refining_of(refined: Request, request: Request) -> Request:
    """What a request says of its refining, and the model's name: `refining_request` makes `refined` of it."""
    differ = {name for name in _DEFAULTS if getattr(refined, name) != getattr(request, name)}
    texts = {"prompt", "negative_prompt", "prompt_2", "negative_prompt_2"}
    kept = differ - {*NOTED, *texts, "seeds", "denoising_start", *FIRST_ONLY} | {"model", "model_hash"}
    return Request(**{name: getattr(refined, name) for name in kept})
