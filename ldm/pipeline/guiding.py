"""A guidance by name in a drawing: what stands around it, and what cannot go with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ldm.diffusion.guidance import CFG, CFGPlusPlus, Guidance, InstructPix2Pix, Limited
from ldm.diffusion.guidances.catalogue import read_guidance
from ldm.diffusion.guidances.chain import Chain
from ldm.diffusion.guidances.part import Part, Rank
from ldm.diffusion.guidances.perturbed import (
    Disturbed,
    PerturbedAttention,
    SelfAttention,
    SkipLayer,
    SmoothedEnergy,
)
from ldm.diffusion.guidances.plain import Interval, Rescale
from ldm.diffusion.schedule import Grid
from ldm.errors import UserError
from ldm.pipeline.model import Model
from ldm.pipeline.networks import Attending
from ldm.pipeline.steering import perturbed
from ldm.request import Request

# A part -> what it wants done in attention's place, in the branches whose names have its ending.
ATTENDING: Mapping[type[Part], Callable[[Any, Model], tuple[Attending, ...]]] = {
    PerturbedAttention: perturbed.attending,
    SmoothedEnergy: perturbed.attending,
    SkipLayer: perturbed.attending,
    SelfAttention: perturbed.hear,
}


def named(plain: Guidance, request: Request, model: Model, grid: Grid) -> Guidance:
    """The guidance that a resolved request names, around the `plain` one of its other fields.

    Raises UserError for what does not go with the model, the sampler, or another field.
    """
    parts = read_guidance(request.guidance or "")
    assert isinstance(plain, CFG | CFGPlusPlus | InstructPix2Pix)
    check(parts, plain, request, model)
    perturbed.check(parts, request, model)
    if plain.rescale:
        parts, plain = (*parts, Rescale(plain.rescale)), type(plain)(**{**vars(plain), "rescale": 0.0})
    begins = request.strength in (None, 1) and request.denoising_start is None
    levels = tuple(grid.sigmas.tolist()) if begins else ()
    limits = [part for part in parts if isinstance(part, Interval)]
    within = tuple(
        (part.name, *model.schedule.between(part.start, part.stop))
        for part in parts
        if isinstance(part, Disturbed) and (part.start, part.stop) != (0, 1)
    )
    chain: Guidance = Chain(plain, tuple(part for part in parts if part not in limits), levels, within)
    for limit in limits:
        chain = Limited(chain, *model.schedule.between(limit.start, limit.stop))
    return chain


def check(parts: tuple[Part, ...], plain: Guidance, request: Request, model: Model) -> None:
    """Raise UserError for what would mean nothing, or two things."""
    name = request.guidance
    uses = [part.name for part in parts if "uncond" in part.reads and part.name != "cfg"]
    combines = [part.name for part in parts if part.rank is Rank.COMBINES and part.name != "cfg"]
    given = {type(part) for part in parts}
    if uses and "timestep_cond" in model.unet.config.conditioning:
        raise UserError(f"guidance {uses[0]} is not for this model, which is told its guidance scale (LCM)")
    if uses and request.image_guidance_scale is not None:
        raise UserError(f"guidance {uses[0]} is not for instruct-pix2pix models, which have two scales")
    if combines and isinstance(plain, CFGPlusPlus):
        raise UserError(
            f"guidance {combines[0]} is not allowed with {request.sampler}: give a sampler without cfg_pp"
        )
    for kind, field in ((Interval, "guidance_interval"), (Rescale, "guidance_rescale")):
        if kind in given and getattr(request, field):
            raise UserError(f"guidance {name} and {field} say the same twice: give one of them")
    for part in parts:
        if isinstance(part, Interval) and part.start >= part.stop:
            raise UserError(f"guidance interval: start {part.start:g} must be less than stop {part.stop:g}")


def attending(request: Request, model: Model) -> tuple[Attending, ...]:
    """What the guidance that a resolved request names wants done in attention's place."""
    found = list[Attending]()
    for part in read_guidance(request.guidance or ""):
        if type(part) in ATTENDING:
            found += ATTENDING[type(part)](part, model)
    return tuple(found)
