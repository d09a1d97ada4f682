"""What goes on from a drawing's latents: a second pass at a larger size ("hires fix"), and a second model.

Each is a drawing like any other, decided with the first: its request follows from that
of the first (`ldm.request.passes`), and it begins with the latents at which that ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ldm.checkpoint.beside.esrgan import read_pixel_upscaler
from ldm.diffusion.noise import Noise
from ldm.diffusion.samplers import Sampler
from ldm.diffusion.schedule import Grid
from ldm.errors import UserError, printable
from ldm.images.enlarging import (
    LABELS,
    LATENT,
    PIXEL,
    Enlarge,
    continued,
    enlarge_latents,
    enlarge_pixels,
    enlarger_name,
)
from ldm.models.conditioning import Conditioning
from ldm.models.kind import Kind
from ldm.pipeline import networks
from ldm.pipeline.inputs import IMAGE_PROMPTS, Inputs
from ldm.pipeline.model import Model
from ldm.pipeline.start import Beginning, FromImage, FromLatents, FromNoise
from ldm.request import Request
from ldm.request.passes import hires_request, refining_request

if TYPE_CHECKING:
    from ldm.pipeline.job import Job

EMBEDS = (
    *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)


def cannot_go_on(request: Request, masked: bool) -> str | None:
    """What a request has that what follows would undo; None if nothing. `masked`: whether by a mask."""
    names = ("target_prompt", "denoising_end")
    return "mask_image" if masked else next((n for n in names if getattr(request, n) is not None), None)


def check_hires(request: Request, kind: Kind, masked: bool) -> None:
    """Raise UserError where a second pass would undo what the first keeps, or cannot be."""
    if kind is not Kind.TEXT:
        raise UserError(f"hires is not allowed here: this model draws from an image ({kind.name.lower()})")
    if (name := cannot_go_on(request, masked)) is not None:
        raise UserError(f"hires is not allowed beside {name}: draw it without")


def hires_enlarger(request: Request) -> tuple[str, str | None]:
    """The name of what enlarges, or a file and the SHA-256 that it must have. Raises UserError."""
    asked = request.hires_upscaler or "latent"
    if (name := enlarger_name(asked)) is not None:
        return name, None
    if "/" not in asked and "\\" not in asked and "." not in asked:
        raise UserError(
            f"hires_upscaler {printable(asked)} is not known: give {', '.join(LABELS)}, or a "
            ".safetensors file"
        )
    return asked, request.hires_upscaler_sha256


@dataclass(frozen=True, eq=False)
class Then:
    """Another job, which goes on from the latents of a first one: a batch of them, or each picture alone."""

    job: Job
    begin: Callable[[Tensor], FromNoise]  # how it begins with latents [B, C, h, w] of the first
    one_by_one: bool

    def count_steps(self, pictures: int) -> int:
        """Of so many pictures of one batch."""
        batch = self.job.pictures[:1] if self.one_by_one else self.job.pictures[:pictures]
        return self.job.count_steps(batch) * (pictures if self.one_by_one else 1)


@dataclass(frozen=True, eq=False)
class FromState(FromLatents):
    """From latents that are noisy already: those of a run that was left at the level where this one begins.

    There they are as diffusers has them, ``x / sqrt(sigma^2 + 1)``; in Euler's family x itself.
    """

    scale: float = field(default=1.0, kw_only=True)  # makes x of them
    is_batch: bool = field(default=False, kw_only=True)  # whether they have a row for each picture

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        x = (self.scale * self.image_latents.to(self.device, torch.float32)).expand(len(cond), -1, -1, -1)
        return Beginning(x, {"cond": cond, "uncond": uncond})

    def rows(self, prompts: Sequence[int]) -> Self:
        return self if self.is_batch else super().rows(prompts)


Prepare = Callable[[Model, Sequence[Request], Inputs], "Job"]


def follow(prepare: Prepare, model: Model, requests: Sequence[Request], inputs: Inputs) -> Then | None:
    """What goes on from the latents of resolved requests: first a refiner, then a second pass."""
    first, then = requests[0], None
    if first.hires is not None:
        then = _second_pass(prepare, model.alone, requests, inputs)
    return then if first.refining is None else _refined(prepare, model, requests, inputs, then)


def _second_pass(prepare: Prepare, model: Model, requests: Sequence[Request], inputs: Inputs) -> Then:
    seconds = [hires_request(each, model.vae.downscale) for each in requests]
    request, hires = seconds[0], requests[0].hires or Request()
    own = Inputs(image_latents=_unknown_latents(model, request))
    if request.prompt == requests[0].prompt and request.negative_prompt == requests[0].negative_prompt:
        embeds = {name: getattr(inputs, name) for name in EMBEDS}
        own = replace(own, **embeds)
    own = replace(own, **{name: getattr(inputs, name) for name in IMAGE_PROMPTS})
    own = replace(
        own,
        control_images=inputs.control_images,
        solver=inputs.solver if request.sampler == requests[0].sampler else None,
        guidance=inputs.guidance if hires.guidance_scale is None else None,
    )
    job = prepare(model, seconds, own)
    name, digest = hires_enlarger(requests[0])
    enlarge = _enlarger(name, digest, job.model.device)
    start, vae, size = job.start, job.model.vae, request.size

    def begin(latents: Tensor) -> FromNoise:
        if name in LATENT:
            large = continued(enlarge, request.tiling)(latents, start.shape[1:])
            return FromLatents(start.shape, start.grid, start.device, large)
        pixels = continued(enlarge, request.tiling)(networks.decode(vae, latents), size)
        samples = vae.is_variational
        return FromImage(start.shape, start.grid, start.device, vae, pixels, samples=samples)

    return Then(job, begin, one_by_one=True)


def _enlarger(name: str, digest: str | None, device: torch.device) -> Enlarge:
    """By a name of `LABELS`, or by the network in a file."""
    if name in LATENT:
        return partial(enlarge_latents, name)
    if name in PIXEL:
        return partial(enlarge_pixels, name)
    network = read_pixel_upscaler(name, device, digest)

    def enlarge(images: Tensor, size: tuple[int, int]) -> Tensor:
        while images.shape[-2] < size[0] or images.shape[-1] < size[1]:
            images = network(images)
        return images if images.shape[-2:] == size else enlarge_pixels("lanczos", images, size)

    return enlarge


# --- a second model --------------------------------------------------------------------------------------


def _refined(
    prepare: Prepare, model: Model, requests: Sequence[Request], inputs: Inputs, then: Then | None
) -> Then:
    refiner = model.refiner
    assert refiner is not None
    if any(getattr(inputs, name) is not None for name in EMBEDS):
        raise UserError(
            "embeddings are not allowed with a refiner, which reads prompts by itself: give those"
        )
    own = [refining_request(each, refiner.parts.text_encoder is None) for each in requests]
    latents = _unknown_latents(refiner, own[0])
    job = prepare(refiner, own, Inputs(image_latents=latents, solver=inputs.solver, guidance=inputs.guidance))
    start = job.start
    assert isinstance(start, FromState)

    def begin(latents: Tensor) -> FromNoise:
        return replace(start, image_latents=latents, is_batch=True)

    return Then(replace(job, then=then), begin, one_by_one=False)


# --- at a noise level ------------------------------------------------------------------------------------


def cut(grid: Grid, request: Request, sampler: Sampler) -> Grid:
    """The part of a grid from denoising_start to denoising_end, or to where a refiner goes on.

    As in diffusers: of T timesteps of training, those below ``round(T - start T)`` and from ``round(T - end
    T)`` on. Raises UserError where that is nothing.
    """
    total = len(grid.schedule.alphas_cumprod)
    start, end, name = request.denoising_start, request.denoising_end, "denoising_end"
    if request.refining is not None:
        end, name = request.refiner_switch_at, "refiner_switch_at"
    if start is not None and end is not None and start >= end:
        raise UserError(f"denoising_start {start:g} is not allowed: it must be less than {name} {end:g}")
    if start is not None:
        n = int((grid.timesteps < round(total - start * total)).sum())
        if n == 0:
            raise UserError(f"denoising_start {start:g} leaves no step: give less of it, or more steps")
        grid = grid.last(n)
    if end is not None:
        n = int((grid.timesteps >= round(total - end * total)).sum())
        if n == 0:
            raise UserError(f"{name} {end:g} leaves no step before it: give more of it, or more steps")
        if n < len(grid.timesteps):
            grid = grid.first(n, scaled=sampler.rules.family != "k")
    return grid


def resumed(start: FromNoise, request: Request, sampler: Sampler) -> FromNoise:
    """`start` of a run that begins at `denoising_start` with latents. Raises UserError without those."""
    if not isinstance(start, FromLatents):
        raise UserError(
            "denoising_start is for latents as the image, of a call with denoising_end and output_type "
            '"latent": for a picture, give strength'
        )
    if request.strength is not None:
        raise UserError("strength is not allowed beside denoising_start, which says where to begin")
    sigma = float(start.grid.sigmas[0])
    scale = 1.0 if sampler.rules.family == "k" else math.hypot(sigma, 1)
    return FromState(start.shape, start.grid, start.device, start.image_latents, scale=scale)


def _unknown_latents(model: Model, request: Request) -> Tensor:
    """Without values: the latents of a picture that is to be drawn."""
    height, width = (side // model.vae.downscale for side in request.size)
    return torch.empty(1, model.vae.latent_channels, height, width, device="meta")
