"""What AUTOMATIC1111's txt2img and img2img ask for, as our requests.

Most settings have a place in its `parameters` text, which `ldm.images.parameters` reads: what they mean
is written there once. Fields that nobody knows are ignored, and named in the log; what cannot be done is
refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError, printable
from ldm.images.parameters import parse_parameters
from ldm.request import Request
from ldm.request.fields import consecutive_seeds, short
from ldm.serve.sdapi.lists import model_named
from ldm.serve.sdapi.units import fields_of_units
from ldm.serve.service import Service
from ldm.serve.uploads import decode_base64

RESIZE_MODES = (None, "crop", "fill", "latent")
FILLS = ("blur", "original", "noise", "nothing")  # inpainting_fill
ANY_SEED = -1
# Ours, and theirs that change nothing here: every picture is kept, no grid is made.
KNOWN = {
    *("prompt", "negative_prompt", "seed", "subseed", "subseed_strength", "seed_resize_from_h"),
    *("seed_resize_from_w", "sampler_name", "sampler_index", "scheduler", "batch_size", "n_iter", "steps"),
    *("cfg_scale", "width", "height", "tiling", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise"),
    *("denoising_strength", "override_settings", "enable_hr", "hr_scale", "hr_upscaler", "hr_prompt"),
    *("hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_sampler_name", "hr_scheduler"),
    *("hr_negative_prompt", "init_images", "resize_mode", "mask", "mask_blur", "mask_blur_x", "mask_blur_y"),
    *("inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert"),
    *("send_images", "save_images", "do_not_save_samples", "do_not_save_grid", "script_args", "mask_round"),
    *("override_settings_restore_afterwards", "firstphase_width", "firstphase_height", "force_task_id"),
    *("include_init_images", "image_cfg_scale", "disable_extra_networks", "comments", "s_min_uncond"),
    *("batch_count", "refiner_switch_at", "styles"),
}
# What would draw something else, and cannot be done: refused where it asks for anything.
CANNOT = (
    *("restore_faces", "refiner_checkpoint", "script_name", "alwayson_scripts", "infotext"),
    *("hr_checkpoint_name", "latent_mask"),
)
log = logging.getLogger("ldm.serve")


@dataclass(frozen=True)
class Drawing:
    """What was asked, read."""

    request: Request
    model: str
    batch_size: int
    sends_images: bool
    styles: list[str]


def read_drawing(
    service: Service, given: Mapping[str, Any], options: Mapping[str, Any], is_img2img: bool
) -> Drawing:
    """A drawing of the fields given; `options` are the server's own, which override_settings go before.

    Raises UserError, naming the field.
    """
    has_networks = service.shelf.control_dir is not None
    check_known(given, ("controlnet",) if has_networks else ())
    options = {**options, **(given.get("override_settings") or {})}
    batch_size, n_iter = (whole(given.get(name) or 1, name) for name in ("batch_size", "n_iter"))
    count = service.limits.count(batch_size * n_iter, "batch_size x n_iter")
    # parse_parameters reads "Hires upscaler" and all others; prompts come after, as they hold anything.
    read = parse_parameters(settings_text(given, options, is_img2img))
    fields: dict[str, Any] = {**read.filled_in(), "seeds": consecutive_seeds(seed_of(given), count)}
    fields |= {"prompt": given.get("prompt") or "", "negative_prompt": given.get("negative_prompt") or ""}
    fields = service.dressed({**fields, "styles": given.get("styles")})
    fields |= sampler_fields(given, read)
    if read.hires is not None and given.get("hr_negative_prompt"):
        fields["hires"] = read.hires.replace(negative_prompt=given["hr_negative_prompt"]).filled_in()
    if is_img2img:
        fields |= images_of(service, given, read)
    if has_networks:
        fields |= fields_of_units(service, given, read.size, read.hires is not None)
    model = model_named(service, options)
    for name in ("version", "model", "model_hash"):
        fields.pop(name, None)
    sends_images, styles = bool(given.get("send_images", True)), given.get("styles") or []
    return Drawing(Request(**fields), model, batch_size, sends_images, styles)


def check_known(given: Mapping[str, Any], scripts: Collection[str] = ()) -> None:
    """Raise UserError for what cannot be done; say in the log what is ignored. `scripts` can be done."""
    for name in CANNOT:
        value = given.get(name)
        if name == "alwayson_scripts" and isinstance(value, dict):
            others = {key: each for key, each in value.items() if key.lower() not in scripts}
            value = {key: each for key, each in others.items() if any((each or {}).get("args") or [])}
        if value and value != "None":
            raise UserError(f"{name} {short(value)} is not allowed: this server cannot do that")
    if given.get("initial_noise_multiplier") not in (None, 1, 1.0):
        raise UserError("initial_noise_multiplier is not allowed: this server has none but 1")
    unknown = sorted({*given} - KNOWN - {*CANNOT, "initial_noise_multiplier"})
    if unknown:
        log.info("ignored, as nobody here knows it: %s", printable(", ".join(unknown))[:500])


def seed_of(given: Mapping[str, Any]) -> int:
    seed = given.get("seed")
    return whole(ANY_SEED if seed is None else seed, "seed")


def settings_text(given: Mapping[str, Any], options: Mapping[str, Any], is_img2img: bool) -> str:
    """The settings as AUTOMATIC1111 writes them into pictures."""
    sampler = given.get("sampler_name") or given.get("sampler_index") or "Euler"
    scheduler = given.get("scheduler")
    strength, resize = given.get("subseed_strength") or 0, seed_resize(given)
    values: dict[str, Any] = {
        "Steps": given.get("steps") or 50,
        "Sampler": sampler,
        "Schedule type": None if str(scheduler).lower() in ("none", "automatic", "") else scheduler,
        "CFG scale": given.get("cfg_scale", 7),
        "Size": f"{given.get('width') or 512}x{given.get('height') or 512}",
        "Variation seed": max(0, whole(given.get("subseed") or 0, "subseed")) if strength else None,
        "Variation seed strength": strength or None,
        "Seed resize from": resize,
        "ENSD": options.get("eta_noise_seed_delta") or None,
        "Clip skip": options.get("CLIP_stop_at_last_layers") or 1,
        "Tiling": True if given.get("tiling") else None,
        "Denoising strength": given.get("denoising_strength", 0.75) if is_img2img else None,
    }
    if given.get("enable_hr") and not is_img2img:
        values |= hires_settings(given)
    said = {key: value for key, value in values.items() if value is not None}
    return ", ".join(f"{key}: {quoted(value)}" for key, value in said.items())


def quoted(value: Any) -> str:
    """A text in quotes, whatever it holds: no value ends in the next setting."""
    return json.dumps(value) if isinstance(value, str) and not value.isalnum() else str(value)


def seed_resize(given: Mapping[str, Any]) -> str | None:
    width, height = (given.get(f"seed_resize_from_{side}") or 0 for side in "wh")
    if width <= 0 or height <= 0:
        return None
    return f"{width}x{height}"


def hires_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a second pass."""
    width, height = (given.get(f"hr_resize_{axis}") or 0 for axis in "xy")
    size = {"Hires resize": f"{width}x{height}"} if width and height else {}
    return {
        **(size or {"Hires upscale": given.get("hr_scale") or 2}),
        "Hires upscaler": given.get("hr_upscaler") or "Latent",
        "Hires steps": given.get("hr_second_pass_steps") or 0,
        "Hires sampler": given.get("hr_sampler_name") or None,
        "Hires prompt": given.get("hr_prompt") or None,
        "Denoising strength": given.get("denoising_strength", 0.7),
    }


def sampler_fields(given: Mapping[str, Any], read: Request) -> dict[str, Any]:
    """What the sampler takes of eta and churn: programs send them whatever the sampler is."""
    fields: dict[str, Any] = {}
    if given.get("eta") is not None and SAMPLERS[str(read.sampler)].takes_eta:
        fields["eta"] = given["eta"]
    if given.get("s_churn"):
        names = [name for name in ("s_churn", "s_tmin", "s_tmax", "s_noise") if given.get(name)]
        fields["sampler_options"] = {name: given[name] for name in names}
    return fields


def whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise UserError(f"{name} {short(value)} is not allowed: it must be a whole number")
    return int(value)


# --- pictures --------------------------------------------------------------------------------------------


def images_of(service: Service, given: Mapping[str, Any], read: Request) -> dict[str, Any]:
    """The fields of what is drawn on, and of its mask. Raises UserError."""
    images = given.get("init_images") or []
    if not isinstance(images, list) or len(images) != 1:
        raise UserError("init_images is not allowed: this server draws from one picture at a time")
    mode = given.get("resize_mode") or 0
    if mode not in range(len(RESIZE_MODES)):
        raise UserError(f"resize_mode {short(mode)} is not allowed: it must be 0 to {len(RESIZE_MODES) - 1}")
    fields: dict[str, Any] = {"resize_mode": RESIZE_MODES[mode]}
    fields["image"] = take(service, images[0], "init_images")
    if not given.get("mask"):
        return fields
    fill = given.get("inpainting_fill", 1)
    if fill not in range(len(FILLS)):
        raise UserError(f"inpainting_fill {short(fill)} is not allowed: it must be 0 to {len(FILLS) - 1}")
    blurs = [given[name] for name in ("mask_blur_x", "mask_blur_y") if given.get(name) is not None]
    whole_picture = not given.get("inpaint_full_res", True)
    return fields | {
        "mask_image": take(service, given["mask"], "mask"),
        "mask_blur": given.get("mask_blur", max(blurs, default=4)),
        "mask_fill": FILLS[fill],
        "mask_invert": bool(given.get("inpainting_mask_invert")),
        "padding_mask_crop": None if whole_picture else given.get("inpaint_full_res_padding", 0),
    }


def take(service: Service, value: Any, name: str) -> str:
    """Where the store has a picture that is given as base64. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"{name} {short(value)} is not allowed: it must be base64 of a picture")
    return f"uploads/{service.uploads.put(decode_base64(value, name), name)}"
