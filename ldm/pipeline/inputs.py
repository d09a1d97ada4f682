"""What a drawing may be given beside its request, because no JSON can hold it; and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance
from ldm.diffusion.solvers import Solver
from ldm.errors import UserError
from ldm.images.fitting import InMemory
from ldm.images.pixels import to_numpy, to_pil
from ldm.request import Request

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors, generators and functions of the caller. None is what is not given."""

    generators: Sequence[torch.Generator] | None = None  # one per image, instead of the seeds
    latents: Tensor | None = None  # [images, C, h, w] unit noise to start from
    prompt_embeds: Tensor | None = None  # [prompts, N, D], instead of the prompts
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None  # [prompts, P], with those (SDXL)
    negative_pooled_prompt_embeds: Tensor | None = None
    image: InMemory | None = None  # to draw from, instead of the request's file
    mask_image: InMemory | None = None
    solver: Solver | None = None  # the user's own, instead of the sampler
    guidance: Guidance | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """What is given, by the names of the call's arguments."""
        names = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        return tuple(_ARGUMENTS.get(name, name) for name in names)

    def not_kept(self, seeds: Sequence[int]) -> tuple[str, ...]:
        """What of it no request of these seeds keeps: all but generators that give what the seeds give."""
        as_seeds = self.generators is not None and all_new(self.generators, seeds)
        return tuple(name for name in self.given if not (as_seeds and name == "generator"))


_ARGUMENTS = {"generators": "generator", "solver": "sampler"}  # where the call names them otherwise


NOTHING = Inputs()


@dataclass(frozen=True)
class Result:
    """What was drawn: `images` in the output type asked for, and the requests that draw them again."""

    images: Any
    requests: tuple[Request, ...]

    @property
    def request(self) -> Request:
        """The request of the first prompt, with everything filled in."""
        return self.requests[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """One per image."""
        return tuple(seed for request in self.requests for seed in request.seeds)


def check_output_type(output_type: str) -> None:
    """Raises UserError for one that is not in `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {output_type!r} is not allowed: give {', '.join(OUTPUT_TYPES)}")


def as_output(images: Tensor, output_type: str) -> Any:
    """[B, 3, H, W] in 0..1 (or latents) in the type asked for."""
    if output_type == "pil":
        return to_pil(images)
    return to_numpy(images) if output_type == "np" else images


def one_each(text: str | Sequence[str] | None, count: int, name: str) -> list[str | None]:
    """One text for each of `count` prompts; for "prompt" as many as there are."""
    if text is None or isinstance(text, str):
        return [text] * count
    if not text or (name != "prompt" and len(text) != count):
        raise UserError(f"{name} has {len(text)} texts for {count} prompts: give one, or one for each")
    return list(text)


def all_new(generators: Sequence[torch.Generator], seeds: Sequence[int]) -> bool:
    """Whether they give what these seeds give: none was drawn from yet, and none is there twice."""
    if len({id(each) for each in generators}) < len(generators) or len(generators) != len(seeds):
        return False
    new = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
    return all(torch.equal(each.get_state(), state) for each, state in zip(generators, new, strict=True))


def own_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator] | None:
    """One per picture; one alone is drawn from by each picture in turn."""
    if generator is None:
        return None
    generators = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != count:
        raise UserError(f"{len(generators)} generators for {count} pictures: give one, or one per picture")
    return generators
