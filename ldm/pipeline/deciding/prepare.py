"""From what is asked to a `Job`: everything that a drawing needs, decided once.

`prepare` fills in the model's defaults, reads the images, and chooses grid, sampler, guidance and batches.
What is wrong with a request is said here, before anything is drawn. `ldm.pipeline.sample` draws a job.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from ldm.checkpoint import Parts
from ldm.checkpoint.save import pipeline_class
from ldm.control import controls_of, depth_of
from ldm.diffusion.guidance import (
    CFG,
    CFGPlusPlus,
    ClassifierGuidance,
    Guidance,
    InstructPix2Pix,
    Limited,
    cfg_pp_strength,
)
from ldm.diffusion.noise import Seed
from ldm.diffusion.samplers import SAMPLERS, Sampler, resolve_sampler
from ldm.diffusion.schedule import Grid
from ldm.diffusion.scheduler_config import noise_levels
from ldm.diffusion.tiles import Tiles
from ldm.diffusion.variance import LearnedVariance
from ldm.errors import UserError
from ldm.images.fitting import fit_image, fit_mask, size_of
from ldm.models.conditioning import Conditioning
from ldm.models.kind import Kind
from ldm.pipeline import networks
from ldm.pipeline.conditioning import Telling
from ldm.pipeline.deciding import before, guiding
from ldm.pipeline.deciding.passes import cut, follow, resumed
from ldm.pipeline.deciding.pictures import NO_IMAGES, Images, in_shape, masked, read_images, shown
from ldm.pipeline.deciding.plan import Plan, arranged
from ldm.pipeline.deciding.resolve import meaningless_eta, resolve
from ldm.pipeline.edit import Invert, check_edit, invertible
from ldm.pipeline.image_prompts import read_image_prompts
from ldm.pipeline.inputs import NOTHING, Inputs
from ldm.pipeline.job import NO_NEEDS, Batch, Job, Picture
from ldm.pipeline.model import Model
from ldm.pipeline.networks import Savings
from ldm.pipeline.start import Edit, Enlarge, FromImage, FromLatents, FromNoise, FromSmaller, Inpaint, Masked
from ldm.pipeline.steering.prompt_to_prompt import check_swap
from ldm.pipeline.steering.steering import UNSTEERED, steering_of
from ldm.request import IMAGES, OWN, Request

LCM = "LatentConsistencyModelPipeline"  # as diffusers names it


def prepare(
    model: Model,
    request: Request | Sequence[Request],
    inputs: Inputs = NOTHING,
    batch_size: int | None = None,
) -> Job:
    """Decide how a request is drawn, or several that differ only in texts and seeds.

    Args:
        inputs: what no request can hold: tensors, generators, functions.
        batch_size: the most pictures to draw at once; by default as many as memory suggests.

    Raises:
        UserError: naming the argument that is not allowed, its value and what is; with what it would take,
            where the drawing does not fit into the model's `max_memory`.
    """
    job = _prepare(model, request, inputs, batch_size)
    if model.max_memory is None:
        return job
    return _prepare(arranged(model, plan_of(job, model.max_memory).choose()), request, inputs, batch_size)


def plan_of(job: Job, room: int) -> Plan:
    return Plan(job, room, _prepare)


def _prepare(
    model: Model,
    request: Request | Sequence[Request],
    inputs: Inputs = NOTHING,
    batch_size: int | None = None,
) -> Job:
    asked = (request,) if isinstance(request, Request) else tuple(request)
    check_alike(asked)
    images, has_images = NO_IMAGES, asked[0].has_images or inputs.has_images
    if any(each.target_prompt is not None for each in asked):
        (check_edit if has_images else check_swap)(asked, inputs)
    if has_images:
        images = read_images(model, asked, inputs)
    prompted = None
    if asked[0].image_prompts or model.adapted.image_prompts or inputs.has_image_prompts:
        prompted = read_image_prompts(model, asked, inputs)
        asked = tuple(each.replace(image_prompts=() if prompted is None else prompted.uses) for each in asked)
    requests = tuple(resolve(model, each, images) for each in asked)
    first = requests[0]
    images = in_shape(images, first) if first.resize_mode else images
    if first.not_kept:
        files = [name for name in IMAGES if getattr(first, name) is not None]
        first.check_given([*inputs.given, *files])
    goes_on = first.hires is not None or first.refining is not None
    then = follow(_prepare, model, requests, inputs) if goes_on else None
    model = model.for_request(first) if first.loras or first.tiling else model
    sampler, _ = resolve_sampler(inputs.solver or str(first.sampler))
    if asked[0].eta and not sampler.takes_eta:
        raise meaningless_eta(asked[0].eta, sampler.name)
    n, spacing = first.num_inference_steps, first.spacing
    if first.timesteps or first.sigmas:
        n = spacing = None
    # As in diffusers: its pipeline for LCMs makes all steps within the strength, the others their last share.
    spread = spacing == "lcm" and not first.is_old and pipeline_class(model.parts) == LCM
    strength = 1.0 if first.strength is None or not spread else first.strength
    solver_options, rho = chosen_options(first, sampler, spacing) if first.sampler_options else ({}, None)
    grid = model.schedule.grid(n, spacing, sampler, first.timesteps, first.sigmas, strength, rho)
    if first.is_old and spacing == "ays" and n is not None:
        grid = before.align_your_steps(model.schedule, sampler, n)
    grid = grid if spread else trim_to_strength(grid, first)
    if first.denoising_start is not None or first.denoising_end is not None or first.refining is not None:
        grid = cut(grid, first, sampler)
    grid = grid if first.target_prompt is None or images.image is None else invertible(grid)
    depth = (
        None
        if model.kind is not Kind.DEPTH
        else depth_of(first, shown(inputs, images), model.controls, model.vae.downscale)
    )
    tiles = tiles_of(first, model.vae.downscale)
    telling = Telling(model, requests, inputs, len(grid.timesteps), depth, prompted)
    start = start_of(
        model,
        first,
        grid,
        images,
        lambda p: telling(p, source=True)[0],
        inputs.image_latents,
    )
    start = start if first.denoising_start is None else resumed(start, first, sampler)
    attending = () if prompted is None else prompted.attending(first.size, tiles is not None)
    needs, is_named = NO_NEEDS, first.guidance is not None and inputs.guidance is None
    if is_named:
        attending, needs = (*attending, *guiding.attending(first, model)), guiding.needed(first, model)
    kept = requests if inputs is NOTHING and not first.not_kept else inputs.as_kept(requests)
    pictures = list_pictures(kept, inputs, start.shape)
    return Job(
        model=model,
        requests=kept,
        encode=telling,
        sampler=sampler,
        options=solver_options | options_of(first, sampler, grid),
        grid=grid,
        guidance=completed(inputs.guidance or guidance_of(first, model, grid), first, model),
        start=start,
        batches=tuple(cut_into_batches(model, pictures, telling.length, 1 if sampler.alone else batch_size)),
        tiles=tiles,
        then=then,
        savings=savings_of(first),
        attending=attending,
        steering=steering_of(model, requests, inputs, telling, grid, images.image is not None)
        if first.is_steered
        else UNSTEERED,
        needs=needs,
        controls=controls_of(first, shown(inputs, images), model.controls) if first.control else (),
    )


def check_alike(requests: Sequence[Request]) -> None:
    """Raise UserError for requests that one job cannot draw."""
    first, *others = (each.model_dump(exclude=OWN) for each in requests)
    for name in first:
        if any(each[name] != first[name] for each in others):
            name = "LoRAs" if name == "loras" else name
            raise UserError(f"prompts of one call have the same {name}: give others to another call")


def chosen_options(
    request: Request, sampler: Sampler, spacing: str | None
) -> tuple[dict[str, float], float | None]:
    """`sampler_options` of a request: the solver's keyword arguments, and ``rho`` of its spacing or None.

    Raises UserError for what neither takes.
    """
    asked: dict[str, float] = dict(request.sampler_options or ())
    rho = asked.pop("rho", None)
    if rho is not None and (spacing is None or rho <= 0):
        raise UserError(f"sampler option rho={rho:g} is not allowed: it is above 0, and of a spacing")
    return sampler.chosen(asked), rho


def options_of(request: Request, sampler: Sampler, grid: Grid) -> dict[str, Any]:
    """Keyword arguments of the sampler's solver, but for the request's own options."""
    options: dict[str, Any] = {}
    if sampler.takes_eta and request.eta is not None:
        options["eta"] = request.eta
    if grid.orders and not request.is_old:
        options["orders"] = grid.orders
    if sampler.takes_variance:
        options["variance"] = grid.schedule.variance
    if sampler.takes_times:
        options["times"] = grid
    return options


def trim_to_strength(grid: Grid, request: Request) -> Grid:
    """The part of a grid that is drawn: its last `strength`. Raises UserError where that is nothing."""
    skipped = len(grid.timesteps) - request.num_steps
    if request.strength is None or skipped == 0:
        return grid
    if request.num_steps == 0:
        raise UserError(
            f"strength {request.strength:g} of {len(grid.timesteps)} steps leaves none: give more of either"
        )
    return grid.last(request.num_steps)


def start_of(
    model: Model,
    request: Request,
    grid: Grid,
    images: Images,
    source: Callable[[int], Conditioning],
    latents: Tensor | None = None,
) -> FromNoise:
    """How the pictures of a resolved request begin, with its images resized; `source` is of `Invert`."""
    size, factor, vae = request.size, model.vae.downscale, model.vae
    small = (size[0] // factor, size[1] // factor)
    shape, device = (vae.latent_channels, *small), model.runtime.device
    if latents is not None:
        if latents.shape[-2:] != small:
            raise UserError(
                f"latents of {list(latents.shape[-2:])} as the image do not fit pictures of {list(size)}, "
                f"which have {list(small)}: leave height and width out"
            )
        return FromLatents(shape, grid, device, latents)
    if images.image is None:
        return FromNoise(shape, grid, device)
    if model.kind is Kind.UPSCALE:
        low_res = 2 * fit_image(images.image, small, bicubic=True).to(device) - 1
        levels = noise_levels(model.parts.low_res_scheduler or {})
        return Enlarge(shape, grid, device, low_res, float(levels[request.noise_level or 0]))
    samples = vae.is_variational or request.is_old
    if images.mask is not None and request.target_prompt is None:
        pixels, mask, place = masked(request, images)
        keeps, within = request.strength != 1, Inpaint if model.kind is Kind.INPAINT else Masked
        fill = request.mask_fill or "original"
        return within(shape, grid, device, vae, pixels, mask, place, keeps, fill, samples=samples)
    if request.resize_mode == "latent" and model.kind is Kind.TEXT and request.target_prompt is None:
        own = tuple(max(factor, side // factor * factor) for side in size_of(images.image))
        return FromSmaller(shape, grid, device, vae, fit_image(images.image, own), samples=samples)
    pixels = fit_image(images.image, size)
    if model.kind is Kind.PIX2PIX:
        return Edit(shape, grid, device, vae, pixels)
    if request.target_prompt is not None:
        may_change = None if images.mask is None else fit_mask(images.mask, size)
        encode = lru_cache(maxsize=1)(lambda: networks.encode(vae, pixels))
        return Invert(shape, grid, device, pixels, may_change, source, encode)
    return FromImage(shape, grid, device, vae, pixels, samples=samples)


def tiles_of(request: Request, factor: int) -> Tiles | None:
    """The windows of a resolved request; None for a picture that one holds."""
    if request.tile_size is None or request.tile_overlap is None or request.tile_size >= max(request.size):
        return None
    return Tiles(request.tile_size // factor, request.tile_overlap // factor, factor)


def savings_of(request: Request) -> Savings:
    """What the U-Net leaves out in the drawing of a resolved request."""
    return Savings(
        request.cache_interval or 1, request.cache_branch_id or 0, request.token_merging_ratio or 0.0
    )


def list_pictures(requests: Sequence[Request], inputs: Inputs, shape: tuple[int, int, int]) -> list[Picture]:
    """Every picture of resolved requests, in order. Raises UserError for latents of another shape."""
    pictures = [
        Picture(p, each, seed, noise_source(each, seed, shape))
        for p, each in enumerate(requests)
        for seed in each.seeds
    ]
    if inputs.generators is not None:
        pictures = [replace(each, source=g) for each, g in zip(pictures, inputs.generators, strict=True)]
    if inputs.latents is not None:
        given, wanted = list(inputs.latents.shape), [len(pictures), *shape]
        if given != wanted:
            raise UserError(f"latents {given} are not allowed: these pictures need {wanted}")
        pictures = [replace(each, latents=own) for each, own in zip(pictures, inputs.latents, strict=True)]
    return pictures


def noise_source(request: Request, seed: int, shape: tuple[int, int, int]) -> int | Seed:
    """What the noise of a resolved request's picture comes of; `shape` is that of its latents."""
    if request.is_old:
        return seed % 2**32
    share, drawn_at = request.variation_strength or 0.0, request.seed_resize
    if request.noise != "gpu" and not share and drawn_at is None and not request.noise_seed_delta:
        return seed
    factor = request.size[0] // shape[1]
    return Seed(
        seed,
        gpu=request.noise == "gpu",
        variation=request.variation_seed or 0,
        share=share,
        drawn_at=None if drawn_at is None else (drawn_at[0] // factor, drawn_at[1] // factor),
        delta=request.noise_seed_delta or 0,
    )


def guidance_of(request: Request, model: Model, grid: Grid) -> Guidance:
    """What a resolved request says of guidance. Raises UserError for what does not go together."""
    plain = plain_guidance(request, model.parts)
    return plain if request.guidance is None else guiding.named(plain, request, model, grid)


def plain_guidance(request: Request, parts: Parts) -> Guidance:
    """As in diffusers, a scale of at most 1 means no guidance, and a model told the scale needs none.

    Raises UserError for a CFG++ sampler where an image guides too.
    """
    scale, image_scale = request.guidance_scale or 1.0, request.image_guidance_scale
    if scale <= 1 or "timestep_cond" in parts.unet.config.conditioning:
        return CFG(1.0)
    sampler = SAMPLERS.get(request.sampler or "")
    if sampler is not None and sampler.cfg_pp:
        if image_scale is not None:
            raise UserError(f"{sampler.name} is not for instruct-pix2pix models: give one without cfg_pp")
        strength = cfg_pp_strength(scale, request.num_grid_steps or 1)
        return CFGPlusPlus(strength, request.guidance_rescale)
    if image_scale is None:
        return CFG(scale, request.guidance_rescale)
    return InstructPix2Pix(scale, image_scale, request.guidance_rescale) if image_scale >= 1 else CFG(1.0)


def completed(guidance: Guidance, request: Request, model: Model) -> Guidance:
    """`guidance` with what goes around any: the interval that it is limited to, the gradient of a classifier,
    if the request names a class, and the variance that the network says, if it has learned one.
    """
    if request.guidance_interval is not None:
        guidance = Limited(guidance, *model.schedule.between(*request.guidance_interval))
    if request.classifier_class is not None and model.classifier is not None:
        classifier, scale = model.classifier.network, request.classifier_scale
        gradient = networks.class_gradient(
            classifier, classifier.config.classes.index(request.classifier_class)
        )
        guidance = ClassifierGuidance(guidance, gradient, 1.0 if scale is None else scale)
    return LearnedVariance(guidance) if model.parts.learns_variance else guidance


def cut_into_batches(
    model: Model, pictures: Sequence[Picture], length: Callable[[int], int], size: int | None
) -> Iterator[Batch]:
    """Neighbours, at most `size` of them, and no more than memory holds.

    Padding a prompt to its neighbour's length would change its picture: only those of one length, in windows
    of the text encoder, go together.
    """
    if size != 1:
        at_once = model.runtime.images_at_once(*pictures[0].prompt_request.size, model.bytes_per_pixel)
        size = at_once if size is None else min(size, at_once)
    prompts = {picture.prompt for picture in pictures}
    lengths = {p: length(p) for p in prompts} if len(prompts) > 1 else dict.fromkeys(prompts, 1)
    for _, alike in itertools.groupby(pictures, key=lambda picture: lengths[picture.prompt]):
        group = tuple(alike)
        yield from (group[i : i + size] for i in range(0, len(group), size))
