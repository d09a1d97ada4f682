"""A request, with the model's defaults in place of what it leaves open, and checked against the model.

A kind (`ldm.models.kind`) is told by the channels that a U-Net takes beside its latents: a family is a config
and a kind, never a class of its own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch

from ldm.adapters import used_embeddings, wanted_loras
from ldm.checkpoint import Parts
from ldm.checkpoint.beside.esrgan import read_pixel_upscaler
from ldm.control import noted
from ldm.diffusion.samplers import SAMPLERS, resolve_sampler
from ldm.errors import UserError, printable
from ldm.files import check_drawn_with
from ldm.images.enlarging import LABELS
from ldm.images.watermark import check_size, key_named
from ldm.models.kind import Kind
from ldm.pipeline import edit
from ldm.pipeline.deciding import guiding
from ldm.pipeline.deciding.passes import cannot_go_on, check_hires, hires_enlarger
from ldm.pipeline.deciding.pictures import Images
from ldm.pipeline.model import Model
from ldm.pipeline.steering import prompt_to_prompt, regions
from ldm.prompts.world import Words, World
from ldm.request import Request
from ldm.request.fast import fast_fields
from ldm.request.fields import MAX_SIDE
from ldm.request.passes import HIRES_SCALE, SWITCH_AT, hires_of, hires_request, refining_of, refining_request
from ldm.request.uses import DEPTH

CLASSIFIER_SCALE = 4.0  # by default: of the embedded classifier's the nearest to renders; 1 is Bayes' rule


def resolve(model: Model, request: Request, images: Images) -> Request:
    """The request with the model's defaults in place of None, checked.

    So complete that it draws the same picture when defaults change. Raises UserError if the model cannot.
    """
    request = request.replace(**images.digests) if images.digests else request
    check(request, images.image is not None, images.mask is not None, model.parts)
    check_image_size(request, images, model.parts)
    checker = model.safety_checker and model.safety_checker.sha256
    values = (
        _adapters(model, request) | _controls(model, request) | _classifier(model, request) | {"fast": None}
    )
    if model.world is not None and request.drawn_as is None and request.version > 3:
        values["drawn_as"] = _drawn_as(model.world, model.parts, request.replace(**values))
    values |= {"safety_checker_sha256": checker, "nsfw_content_detected": None}  # found when it is drawn
    if request.num_grid_steps is not None:  # a grid of its own counts for itself
        values["num_inference_steps"] = request.num_grid_steps
    if request.guidance is not None:
        values["guidance"] = guiding.noted(request.guidance)
    for name, value in _defaults(model, request, images).items():
        if getattr(request, name) is None:
            values.setdefault(name, value)
    eta, request, factor = request.eta, request.replace(**values), model.vae.downscale
    if eta and not SAMPLERS[str(request.sampler)].takes_eta:
        raise meaningless_eta(eta, str(request.sampler))
    for side in ("height", "width"):
        pixels = getattr(request, side)
        if pixels % factor:
            raise UserError(f"{side} {pixels} is not allowed: this model draws multiples of {factor} pixels")
    if request.watermark is not None:
        check_size(*request.size)
        key_named(request.watermark)  # raises
        if request.transparent:
            raise UserError("watermark is not allowed beside transparent: it would go with the background")
    if request.is_steered:
        request = prompt_to_prompt.resolved(request, images.image is not None)
    if request.regions:
        request = request.replace(regions=regions.resolved(request))
    if request.cache_interval is not None or request.cache_branch_id is not None:
        request = _cached(request, model.parts)
    if request.tile_size is not None or request.tile_overlap is not None:
        request = _tiled(request, factor)
    if request.hires or request.hires_scale or request.hires_upscaler is not None:
        request = _twice(model, request, images.mask is not None)
    if request.tile_size is not None:
        check_tiles(request)
    if model.refiner is not None or request.refining or request.refiner_switch_at is not None:
        request = _refined(model.refiner, request, images.mask is not None)
    if model.upscaler is not None:
        if request.padding_mask_crop is not None:
            raise UserError(
                "padding_mask_crop is not allowed beside an upscaler: enlarge the finished picture"
            )
        return request.replace(upscaling=_upscaling(model.upscaler, request))
    if request.upscaling is not None:
        raise UserError("upscaling is not allowed here: give an upscaler (with_upscaler, --upscaler)")
    return request


def check(request: Request, has_image: bool, has_mask: bool, parts: Parts) -> None:
    """Raise UserError for what this model needs and is not given, and for what would mean nothing to it."""
    kind = parts.kind
    if kind not in (Kind.TEXT, Kind.DEPTH) and not has_image:
        raise UserError(
            f"this model draws from an image ({kind.name.lower()}): give one (image, --init-image)"
        )
    if kind is Kind.INPAINT and not has_mask:
        raise UserError("this model draws what a mask covers: give one (mask_image, --mask)")
    begins = has_image and kind in (Kind.TEXT, Kind.DEPTH, Kind.INPAINT)  # with it
    two_encoders = parts.text_encoder is not None and parts.text_encoder_2 is not None
    sizes = [name for name in Request.model_fields if name.endswith(("l_size", "t_size", "_top_left"))]
    rules = [
        (kind is Kind.TEXT, "text-to-image models", ["target_prompt"]),
        (begins, "text-to-image and inpainting models, with an image,", ["mask_image", "extend"]),
        (has_mask and kind is Kind.TEXT, "text-to-image models, with a mask,", ["soft_mask"]),
        (begins, "img2img and inpainting, with an image,", ["strength"]),
        (has_image and kind is not Kind.UPSCALE, "drawing from an image", ["resize_mode"]),
        (kind is Kind.PIX2PIX, "instruct-pix2pix models", ["image_guidance_scale"]),
        (kind is Kind.UPSCALE, "upscalers, as --model,", ["noise_level"]),
        (two_encoders, "models with two text encoders", ["prompt_2", "negative_prompt_2"]),
        ("time_ids" in parts.unet.config.conditioning, "SDXL models", sizes),
        (parts.requires_aesthetics_score, "SDXL refiners", ["aesthetic_score", "negative_aesthetic_score"]),
    ]
    for taken, who, names in rules:
        for name in names:
            given = has_mask if name == "mask_image" else getattr(request, name) is not None
            if given and not taken:
                raise UserError(f"{name} is not allowed here: only {who} can use it")
    if request.noise_level is not None and request.noise_level > parts.max_noise_level:
        raise UserError(
            f"noise_level {request.noise_level} is not allowed: this model takes 0 to {parts.max_noise_level}"
        )


def meaningless_eta(eta: float, sampler: str) -> UserError:
    """For a sampler that takes none. 0 is no fault anywhere: CompVis's commands give it to all."""
    takers = ", ".join(each.name for each in SAMPLERS.values() if each.takes_eta)
    return UserError(f"eta {eta:g} is not allowed here: {sampler} has none, only {takers} do")


def check_image_size(request: Request, images: Images, parts: Parts) -> None:
    """Raise UserError for an image too small or too large for a picture of its own size, if that is asked."""
    if request.padding_mask_crop is not None or images.size is None:
        return
    if None not in (request.height, request.width):
        return
    height, width = size_from(images.size, parts.kind, parts.vae.downscale)
    if request.extend is not None and (height, width) != images.size:
        unit = math.lcm(8, parts.vae.downscale)
        nearest = " x ".join(str(unit * round(side / unit)) for side in images.size[::-1])
        raise UserError(
            f"extend makes a picture of {images.size[1]} x {images.size[0]} pixels, and this model draws "
            f"multiples of {unit}: the nearest is {nearest}"
        )
    sides = [own for own, asked in ((height, request.height), (width, request.width)) if asked is None]
    if min(sides) >= 8 and max(sides) <= MAX_SIDE:
        return
    fault = "too small" if min(sides) < 8 else "too large"
    name, size = printable(request.image or "the image"), f"{images.size[1]}x{images.size[0]} pixels"
    raise UserError(
        f"{name} has {size}, {fault} for a picture of its own size, of 8 to {MAX_SIDE} pixels a side "
        f"(here {width}x{height}): give another, or the size to draw (width and height; -W and -H)"
    )


def _defaults(model: Model, request: Request, images: Images) -> dict[str, Any]:
    """Fields of a Request -> what they are if it does not say: as ldm.json has them, or else the kind."""
    parts, schedule = model.parts, model.schedule
    height, width = _drawn_size(parts, images.size if request.padding_mask_crop is None else None)
    values = {
        **_kind_defaults(parts, images.image is not None, images.mask is not None),
        **{name: value for name, value in asdict(parts.defaults).items() if value is not None},
        "height": height,
        "width": width,
        "prompt_grammar": request.grammar,
        "model": model.name,
        "model_hash": model.model_hash,
    }
    if request.denoising_start is not None:
        values.pop("strength", None)
    if request.target_prompt is not None and images.image is not None:
        steps = max(values["num_inference_steps"], edit.STEPS)
        values |= {"sampler": edit.SAMPLER, "strength": edit.STRENGTH, "num_inference_steps": steps}
    if request.fast:
        free = request.sampler is None and request.num_grid_steps is None
        steps = request.num_grid_steps or values["num_inference_steps"]
        values |= fast_fields(steps, values.get("sampler") if free else None)
        if request.target_prompt is not None:
            values.pop("cache_interval", None)
    sampler, implied = resolve_sampler(request.sampler or values.get("sampler") or schedule.default_sampler)
    spacing = None
    if not (request.timesteps or request.sigmas):
        spacing = schedule.spacing_for(sampler, implied or values.get("spacing"))
    return {**values, "sampler": sampler.name, "spacing": spacing, "eta": sampler.options.get("eta")}


def _kind_defaults(parts: Parts, has_image: bool, has_mask: bool) -> dict[str, Any]:
    """Fields of a Request -> what they are where neither the caller nor ldm.json says, as in diffusers."""
    is_xl = "time_ids" in parts.unet.config.conditioning
    values = {"num_inference_steps": 50, "guidance_scale": 7.5}
    match parts.kind:
        case Kind.TEXT | Kind.DEPTH:
            values["guidance_scale"] = 5.0 if is_xl else 7.5
            values |= {"strength": 0.3 if is_xl else 0.8} if has_image else {}
            values |= {"strength": 1.0} if has_mask else {}
        case Kind.UPSCALE:
            values = {"num_inference_steps": 75, "guidance_scale": 9.0, "noise_level": 20}
        case Kind.PIX2PIX:
            values |= {"num_inference_steps": 100, "image_guidance_scale": 1.5}
        case Kind.INPAINT:
            values["strength"] = 1.0
    if "timestep_cond" in parts.unet.config.conditioning:  # LCM
        values |= {"num_inference_steps": 4, "guidance_scale": 8.5}
    if parts.requires_aesthetics_score:
        values |= {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
    return values


def _drawn_size(parts: Parts, image: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels of what is drawn by default: that of an image, or what was trained on."""
    return native_size(parts) if image is None else size_from(image, parts.kind, parts.vae.downscale)


def size_from(image: tuple[int, int], kind: Kind, factor: int) -> tuple[int, int]:
    """(height, width) of what is drawn from an image: its own, or `factor` times that, cut to fit."""
    grown, unit = (factor, math.lcm(8, factor**2)) if kind is Kind.UPSCALE else (1, math.lcm(8, factor))
    height, width = (side * grown // unit * unit for side in image)
    return height, width


def native_size(parts: Parts) -> tuple[int, int]:
    """(height, width) in pixels that a model is drawn at where nothing else is said."""
    side, own, factor = parts.unet.config.sample_size or 64, parts.defaults, parts.vae.downscale
    height, width = (side, side) if isinstance(side, int) else side
    return own.height or height * factor, own.width or width * factor


def _adapters(model: Model, request: Request) -> dict[str, Any]:
    """The LoRAs and textual inversions of a request and of the model, as fields of a Request."""
    adapted = model.adapted
    if request.loras or adapted.loras:
        adapted = replace(adapted, loras=wanted_loras(request, adapted.loras, model.lora_dir))
    embeddings = None
    if request.embeddings or adapted.embeddings:
        embeddings = used_embeddings(request, adapted.embeddings)
    return {"loras": adapted.uses or None, "embeddings": embeddings or None}


def _drawn_as(world: World, parts: Parts, request: Request) -> Words:
    """The words in all prompts of a request that this model is to draw as things that it knows."""
    if request.loras:  # which may have taught it any
        return ()
    passes = (request, *(each for each in (request.hires, request.refining) if each is not None))
    texts = [text for each in passes for column in each.texts for text in column]
    texts += [region.prompt for region in request.regions or ()]
    return world.drawn_as(texts, parts.words | {use.name.lower() for use in request.embeddings or ()})


def _controls(model: Model, request: Request) -> dict[str, Any]:
    """The controls of a request, which note which files they are of. Raises UserError."""
    if model.kind is Kind.DEPTH and not any(use.model == DEPTH for use in request.control or ()):
        raise UserError(
            'this model draws with a depth map: give one (control=[{"model": "depth", "image": FILE}], '
            "--control depth,image=FILE)"
        )
    if not request.control:
        return {}
    if request.padding_mask_crop is not None:
        raise UserError("padding_mask_crop is not allowed beside control: draw the whole picture")
    uses = noted(request.control, model.controls)
    if any(model.controls.get(use.model).is_inside for use in uses if use.sha256):
        for name in ("tile_size", "token_merging_ratio"):
            if getattr(request, name):
                raise UserError(
                    f"{name} is not allowed beside an LLLite, which is of whole pictures: leave it out"
                )
    return {"control": uses}


def _classifier(model: Model, request: Request) -> dict[str, Any]:
    """The classifier's part of a request that names a class, as fields of a Request. Raises UserError."""
    wanted, held = request.classifier_class, model.classifier
    if wanted is None:
        for name in ("classifier_scale", "classifier_sha256"):
            if getattr(request, name) is not None:
                raise UserError(f"{name} is not allowed here: it goes with a classifier_class")
        return {}
    if held is None:
        raise UserError(
            f"classifier_class {printable(wanted)} is not allowed here: give the classifier that knows it "
            "(with_classifier, --classifier)"
        )
    check_drawn_with(held.path, "classifier", held.sha256, request.classifier_sha256, "--classifier")
    if wanted not in held.network.config.classes:
        known = ", ".join(held.network.config.classes)
        raise UserError(f"classifier_class {printable(wanted)} is unknown: {held.path} knows {known}")
    scale = CLASSIFIER_SCALE if request.classifier_scale is None else request.classifier_scale
    return {"classifier_scale": scale, "classifier_sha256": held.sha256}


def _upscaling(upscaler: Model, request: Request) -> Request:
    """How a picture of `request` is enlarged, resolved like it."""
    (height, width), factor = (request.hires or request).size, upscaler.vae.downscale
    if max(height, width) * factor > MAX_SIDE:
        raise UserError(
            f"{width}x{height} pixels are too many for this upscaler, which draws {factor} times as large: "
            f"give sides of at most {MAX_SIDE // factor}"
        )
    asked = (request.upscaling or Request()).replace(height=None, width=None, model=None, model_hash=None)
    return resolve(upscaler, asked.replace(tiling=request.tiling), _unknown_image((height, width)))


def _twice(model: Model, request: Request, masked: bool) -> Request:
    """A request whose picture is drawn again at a larger size, with its second pass resolved."""
    check_hires(request, model.kind, masked)
    name, digest = hires_enlarger(request)
    if name not in LABELS:
        digest = read_pixel_upscaler(name, model.device, digest).sha256
    second = hires_request(request, model.vae.downscale)
    second = resolve(model.alone, second, _unknown_image(second.size))
    sized = request.hires is not None and request.hires.height is not None
    return request.replace(
        hires=hires_of(second, request),
        hires_scale=request.hires_scale if sized or request.hires_scale else HIRES_SCALE,
        hires_upscaler=name,
        hires_upscaler_sha256=digest,
    )


def _cached(request: Request, parts: Parts) -> Request:
    """A request whose deep features are kept over steps, with the layer that they go on from."""
    if request.cache_interval is None:
        raise UserError("cache_branch_id is not allowed here: it goes with a cache_interval")
    if request.target_prompt is not None:
        raise UserError(
            "cache_interval is not allowed for an edit, which keeps to each step of another: leave it out"
        )
    branch, last = request.cache_branch_id or 0, parts.unet.num_skips - 1
    if branch > last:
        raise UserError(f"cache_branch_id {branch} is not allowed: this model has 0 to {last}")
    return request.replace(cache_branch_id=branch)


def _tiled(request: Request, factor: int) -> Request:
    """A request that is drawn in windows, with their overlap."""
    size, overlap = request.tile_size, request.tile_overlap
    if size is None:
        raise UserError("tile_overlap is not allowed here: it goes with a tile_size")
    overlap = size // 2 // math.lcm(8, factor) * math.lcm(8, factor) if overlap is None else overlap
    for name, pixels in (("tile_size", size), ("tile_overlap", overlap)):
        if pixels % factor:
            raise UserError(f"{name} {pixels} is not allowed: this model draws multiples of {factor} pixels")
    if overlap >= size:
        raise UserError(f"tile_overlap {overlap} is not allowed: it must be less than tile_size {size}")
    return request.replace(tile_overlap=overlap)


def check_tiles(request: Request) -> None:
    """Raise UserError for tiles that no pass of a resolved request needs, and beside a seamless picture."""
    size = request.tile_size or 0
    largest = max(max(each.size) for each in (request, request.hires) if each is not None)
    if size > largest:
        raise UserError(
            f"tile_size {size} is not allowed: it is larger than the picture, whose longer side "
            f"has {largest} pixels: leave it out"
        )
    if request.tiling is not None and size < largest:
        raise UserError("tiling is not allowed beside tile_size: windows would be seamless, each in itself")


def _refined(refiner: Model | None, request: Request, masked: bool) -> Request:
    """A request whose last steps are a refiner's, with what that draws resolved."""
    if refiner is None:
        name = "refining" if request.refining else "refiner_switch_at"
        raise UserError(f"{name} is not allowed here: give a refiner (with_refiner, --refiner)")
    if (undone := cannot_go_on(request, masked)) is not None:
        raise UserError(f"{undone} is not allowed with a refiner: draw without one")
    at = SWITCH_AT if request.refiner_switch_at is None else request.refiner_switch_at
    request = request.replace(refiner_switch_at=at)
    refined = refining_request(request, refiner.parts.text_encoder is None)
    refined = resolve(refiner, refined, _unknown_image(refined.size))
    return request.replace(refining=refining_of(refined, request))


def _unknown_image(size: tuple[int, int]) -> Images:
    """Of a picture of (height, width) pixels that is to be drawn: without values."""
    return Images(torch.empty(1, 3, *size, device="meta"))
