"""From what is asked to how it is drawn: the model's defaults filled in, then size, grid and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ldm import tasks
from ldm.adapters import used_embeddings, wanted_loras
from ldm.arguments import Beside
from ldm.checkpoint import Parts
from ldm.errors import UserError
from ldm.guidance import Guidance
from ldm.inputs import InMemory
from ldm.request import MAX_SIDE, Request
from ldm.schedule import Grid
from ldm.solvers import Sampler, resolve_sampler

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


@dataclass(frozen=True)
class Plan:
    """How to draw: what all pictures of a call share."""

    shape: tuple[int, int, int]  # of one picture's latents [C, h, w]
    at_once: int  # pictures in a batch
    grid: Grid
    sampler: Sampler
    options: Mapping[str, float]  # of the solver
    guidance: Guidance


def resolve(pipe: Pipeline, request: Request, beside: Beside) -> Request:
    """The request with the model's defaults in place of None, checked, with the SHA-256 of its files.

    So complete that it draws the same picture when defaults change. Raises UserError if the model cannot.
    """
    request, image, mask = tasks.read_images(request, beside)
    tasks.check(request, image is not None, mask is not None, pipe.parts)
    request = _with_adapters(pipe, request)
    if request.num_grid_steps is not None:  # a grid of its own counts for itself
        request = request.replace(num_inference_steps=request.num_grid_steps)
    absent = {
        name: value
        for name, value in _defaults(pipe, request, image).items()
        if getattr(request, name) is None
    }
    request, factor = request.replace(**absent), pipe.vae.downscale
    for side in ("height", "width"):
        pixels = getattr(request, side)
        if pixels % factor:
            raise UserError(f"{side} {pixels} is not allowed: this model draws multiples of {factor} pixels")
    return request.replace(upscaling=_upscaling(pipe.upscaler, request))


def _upscaling(upscaler: Pipeline | None, request: Request) -> Request | None:
    """How a picture of `request` is enlarged, resolved like it."""
    if upscaler is None:
        if request.upscaling is not None:
            raise UserError("upscaling is not allowed here: give an upscaler (with_upscaler, --upscaler)")
        return None
    height, width, factor = request.height or 0, request.width or 0, upscaler.vae.downscale
    if max(height, width) * factor > MAX_SIDE:
        raise UserError(
            f"{width}x{height} pixels are too many for this upscaler, which draws {factor} times as large: "
            f"give sides of at most {MAX_SIDE // factor}"
        )
    asked = (request.upscaling or Request()).replace(height=None, width=None, model=None, model_hash=None)
    return resolve(upscaler, asked, Beside(image=torch.zeros(3, height, width)))


def make_plan(pipe: Pipeline, request: Request, beside: Beside) -> Plan:
    """How a request is drawn. Raises UserError for a grid that this model's schedule does not have."""
    height, width = request.height, request.width
    if height is None or width is None or request.guidance_scale is None or request.sampler is None:
        return make_plan(pipe, resolve(pipe, request, beside), beside)
    sampler, _ = resolve_sampler(beside.solver or request.sampler)
    own = request.timesteps or request.sigmas
    grid = pipe.schedule.grid(
        None if own else request.num_inference_steps,
        None if own else request.spacing,
        sampler,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
    )
    factor = pipe.vae.downscale
    return Plan(
        shape=(pipe.vae.latent_channels, height // factor, width // factor),
        at_once=pipe.runtime.images_at_once(height, width),
        grid=tasks.cut(grid, request),
        sampler=sampler,
        options={"eta": request.eta} if sampler.takes_eta and request.eta is not None else {},
        guidance=beside.guidance or tasks.guidance_of(request, pipe.parts),
    )


def _defaults(pipe: Pipeline, request: Request, image: InMemory | None) -> dict[str, Any]:
    """Fields of a Request -> what they are if it does not say: as ldm.json has them, or else the kind."""
    own = {name: value for name, value in asdict(pipe.parts.defaults).items() if value is not None}
    sampler, implied = resolve_sampler(request.sampler or own.get("sampler") or pipe.schedule.default_sampler)
    spacing = None
    if not (request.timesteps or request.sigmas):
        spacing = pipe.schedule.spacing_for(sampler, implied or own.get("spacing"))
    height, width = _size(pipe.parts, image)
    return {
        **tasks.defaults(pipe.parts, image is not None),
        **own,
        "height": height,
        "width": width,
        "sampler": sampler.name,
        "spacing": spacing,
        "eta": sampler.options.get("eta"),
        "model": pipe.name,
        "model_hash": pipe.model_hash,
    }


def _size(parts: Parts, image: InMemory | None) -> tuple[int, int]:
    """(height, width) in pixels: the image's, or what the model was trained on."""
    if image is not None:
        return tasks.picture_size(image, tasks.kind_of(parts), parts.vae.downscale)
    return native_size(parts)


def native_size(parts: Parts) -> tuple[int, int]:
    """(height, width) in pixels that a model is drawn at where nothing else is said."""
    side, defaults, factor = parts.unet.config.sample_size or 64, parts.defaults, parts.vae.downscale
    height, width = (side, side) if isinstance(side, int) else side
    return defaults.height or height * factor, defaults.width or width * factor


def _with_adapters(pipe: Pipeline, request: Request) -> Request:
    loras = wanted_loras(request, pipe.adapted.loras, pipe.lora_dir)
    return request.replace(
        loras=replace(pipe.adapted, loras=loras).uses or None,
        embeddings=used_embeddings(request, pipe.adapted.embeddings) or None,
    )
