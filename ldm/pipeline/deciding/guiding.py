"""A guidance by name in a drawing: what stands around it, and what cannot go with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.adapters.layers import share
from ldm.adapters.seamless import seamless
from ldm.checkpoint.io import weight_files
from ldm.checkpoint.original.component import load_component
from ldm.checkpoint.parts import STEMS
from ldm.checkpoint.source import find_part
from ldm.checkpoint.weights import find_weights
from ldm.diffusion.guidance import CFG, CFGPlusPlus, Guidance, InstructPix2Pix, Limited, cfg_pp_strength
from ldm.diffusion.guidances.catalogue import read_guidance, spell_guidance
from ldm.diffusion.guidances.chain import Chain
from ldm.diffusion.guidances.geometry import ZeroStar
from ldm.diffusion.guidances.part import Part, Rank
from ldm.diffusion.guidances.perturbed import (
    Disturbed,
    PerturbedAttention,
    SelfAttention,
    SkipLayer,
    SmoothedEnergy,
)
from ldm.diffusion.guidances.plain import Interval, PlusPlus, Rescale
from ldm.diffusion.guidances.worse import THINNED, AutoGuidance
from ldm.diffusion.schedule import Grid
from ldm.errors import UserError
from ldm.files import sha256
from ldm.models import UNet
from ldm.pipeline.job import Needs
from ldm.pipeline.model import Model
from ldm.pipeline.model.moving import move
from ldm.pipeline.networks import Attending
from ldm.pipeline.steering import perturbed
from ldm.request import Request

# A part -> what it wants done in attention's place, in the branches whose names have its ending.
ATTENDING: Mapping[type[Part], Callable[[Any, Model], tuple[Attending, ...]]] = {
    PerturbedAttention: perturbed.attending,
    SmoothedEnergy: perturbed.attending,
    SkipLayer: perturbed.attending,
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
    strength = cfg_pp_strength(plain.scale, request.num_grid_steps or 1) if isinstance(plain, CFG) else None
    parts = tuple(PlusPlus(strength) if part == PlusPlus() else part for part in parts)
    if request.strength not in (None, 1) or request.denoising_start is not None:  # no first steps
        parts = tuple(ZeroStar(0) if isinstance(part, ZeroStar) else part for part in parts)
    limits = [part for part in parts if isinstance(part, Interval)]
    within = tuple(
        (part.name, *model.schedule.between(part.start, part.stop))
        for part in parts
        if isinstance(part, Disturbed) and (part.start, part.stop) != (0, 1)
    )
    own = tuple(part for part in parts if part not in limits)
    chain: Guidance = Chain(plain, own, tuple(grid.sigmas.tolist()), within)
    for limit in limits:
        chain = Limited(chain, *model.schedule.between(limit.start, limit.stop))
    return chain


def check(parts: tuple[Part, ...], plain: Guidance, request: Request, model: Model) -> None:
    """Raise UserError for what would mean nothing, or two things."""
    name = request.guidance
    uses = [part.name for part in parts if "uncond" in part.reads]
    combines = [part.name for part in parts if part.rank is Rank.COMBINES and "uncond" in part.reads]
    given = {type(part) for part in parts}
    if uses and "timestep_cond" in model.unet.config.conditioning:
        raise UserError(f"guidance {uses[0]} is not for this model, which is told its guidance scale (LCM)")
    if uses and request.image_guidance_scale is not None:
        raise UserError(f"guidance {uses[0]} is not for instruct-pix2pix models, which have two scales")
    if combines and isinstance(plain, CFGPlusPlus):
        raise UserError(
            f"guidance {combines[0]} is not allowed with {request.sampler}: give a sampler without cfg_pp"
        )
    if model.parts.learns_variance and any(part.still for part in parts):
        raise UserError(
            "guidance cfg_zero_star asks nothing in its first steps, and this model is to say its variance "
            "in each: give zero_init=0"
        )
    for kind, other in ((Interval, "guidance_interval"), (Rescale, "guidance_rescale")):
        if kind in given and getattr(request, other):
            raise UserError(f"guidance {name} and {other} say the same twice: give one of them")
    for part in parts:
        if isinstance(part, Interval) and part.start >= part.stop:
            raise UserError(f"guidance interval: start {part.start:g} must be less than stop {part.stop:g}")


def attending(request: Request, model: Model) -> tuple[Attending, ...]:
    """What the guidance that a resolved request names does in attention's place. Raises UserError."""
    parts = [part for part in read_guidance(request.guidance or "") if type(part) in ATTENDING]
    return tuple(each for part in parts for each in ATTENDING[type(part)](part, model))


def needed(request: Request, model: Model) -> Needs:
    """Of the guidance that a resolved request names. Raises UserError."""
    networks, empty, middle = dict[str, UNet](), False, False
    for part in read_guidance(request.guidance or ""):
        if isinstance(part, AutoGuidance):
            unet = thinned(model.unet) if part.model == THINNED else read_worse(part, model)
            networks["worse"] = unet if request.tiling is None else seamless(unet, request.tiling)
        empty = empty or "empty" in part.reads
        middle = middle or isinstance(part, SelfAttention)
    return Needs(networks, empty, middle)


# --- another network -------------------------------------------------------------------------------------


def noted(text: str) -> str:
    """A chain in which the file that it reads is noted. Raises UserError if it was another one."""
    parts = read_guidance(text)
    return spell_guidance([_noted(part) if isinstance(part, AutoGuidance) else part for part in parts])


def _noted(part: AutoGuidance) -> AutoGuidance:
    if part.model == THINNED:
        return part
    digest = sha256(*weight_files(_weights(part)))[:10]
    if part.hash not in (None, digest):
        raise UserError(
            f"guidance autoguidance: {part.model} is not the model that this was drawn with: its hash is "
            f"{digest}, that was {part.hash}"
        )
    return replace(part, hash=digest)


def _weights(part: AutoGuidance) -> Path:
    place = find_part(part.model, "unet")
    return find_weights(place, STEMS["unet"]) if place.is_dir() else place


def thinned(unet: UNet) -> UNet:
    """`unet` without its middle block: it shares all tensors. Raises UserError where there is none."""
    if unet.mid_block is None:
        raise UserError(
            "guidance autoguidance: this model has no middle block to leave out: give another (model=FOLDER)"
        )
    made = share(unet)
    made.mid_block = None
    return made


def read_worse(part: AutoGuidance, model: Model) -> UNet:
    """The U-Net that a part names, in the model's dtype, where the model is. Raises UserError."""
    if model.sleeps:
        raise UserError("guidance autoguidance takes no other model beside max_memory: give thinned")
    place, own = find_part(part.model, "unet"), model.unet

    def read() -> UNet:
        unet: UNet = load_component(place, "unet", own.to_config(), model.dtype)
        return move(unet, model.device, None)

    unet = model.with_unet(part, read).unet
    for name in ("in_channels", "out_channels", "conditioning", "cross_attention_dim"):
        said, here = (getattr(each.config, name) for each in (unet, own))
        if said != here:
            raise UserError(
                f"guidance autoguidance: {part.model} does not fit this model: its {name} is {said}, "
                f"here {here}"
            )
    return unet
