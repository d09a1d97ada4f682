"""What a call of a Pipeline takes and gives, beside the Request: tensors, generators, output types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.guidance import Guidance
from ldm.images import to_numpy, to_pil
from ldm.request import Request, consecutive_seeds
from ldm.solvers import Solver

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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


@dataclass(frozen=True)
class Beside:
    """What a call may say beside its requests, because no JSON can hold it."""

    generators: Sequence[torch.Generator] | None = None  # one per image, instead of the seeds
    latents: Tensor | None = None  # [images, C, h, w] unit noise to start from
    prompt_embeds: Tensor | None = None  # [prompts, N, D], instead of the prompts
    negative_prompt_embeds: Tensor | None = None
    solver: Solver | None = None  # the user's own, instead of the sampler
    guidance: Guidance | None = None


NOTHING = Beside()


def count_steps(request: Request) -> int | None:
    """The number of steps that a request asks for, by a number or by its own grid."""
    if request.timesteps is not None:
        return len(request.timesteps)
    return request.num_inference_steps if request.sigmas is None else len(request.sigmas) - 1


def one_each(text: str | Sequence[str] | None, count: int, name: str) -> list[str]:
    """One text for each of `count` prompts; for "prompt" as many as there are."""
    if text is None or isinstance(text, str):
        return [text or ""] * count
    if not text or (name != "prompt" and len(text) != count):
        raise UserError(f"{name} has {len(text)} texts for {count} prompts: give one, or one for each")
    return list(text)


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


def own_seeds(
    seed: int | Sequence[int] | None, generators: Sequence[torch.Generator] | None, count: int
) -> tuple[int, ...]:
    if generators is not None:
        return tuple(each.initial_seed() % 2**63 for each in generators)
    seeds = consecutive_seeds(seed, count)
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} pictures: give one, or one per picture")
    return seeds


def as_output(images: Tensor, output_type: str) -> Any:
    """[B, 3, H, W] in 0..1 (or latents) in the type asked for."""
    if output_type == "pil":
        return to_pil(images)
    return to_numpy(images) if output_type == "np" else images
