"""What a call of a Pipeline takes and gives, beside the Request: tensors, generators, output types."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.guidance import Guidance
from ldm.images import to_numpy, to_pil
from ldm.inputs import InMemory
from ldm.request import Request, consecutive_seeds
from ldm.solvers import Solver

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2")  # beside the prompt: one, or one for each


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
    pooled_prompt_embeds: Tensor | None = None  # [prompts, P], beside those (SDXL)
    negative_pooled_prompt_embeds: Tensor | None = None
    image: InMemory | None = None  # to draw from, instead of the requests' file
    mask_image: InMemory | None = None
    solver: Solver | None = None  # the user's own, instead of the sampler
    guidance: Guidance | None = None

    def embeds(self, p: int, device: torch.device) -> tuple[Conditioning | None, Conditioning | None]:
        """The embeddings given for prompt number `p` and for its negative one, of one row each."""
        cond = _row(p, device, self.prompt_embeds, self.pooled_prompt_embeds)
        return cond, _row(p, device, self.negative_prompt_embeds, self.negative_pooled_prompt_embeds)


NOTHING = Beside()


def _row(p: int, device: torch.device, tokens: Tensor | None, pooled: Tensor | None) -> Conditioning | None:
    """Row `p`, or the only one."""
    if tokens is None:
        return None
    row = slice(p, p + 1) if len(tokens) > 1 else slice(1)
    pooled = None if pooled is None else pooled[row].float().to(device)
    return Conditioning(tokens[row].float().to(device), pooled)


def split_call(call: Mapping[str, Any]) -> tuple[list[Request], Beside]:
    """The arguments of a Pipeline's call, by name: a request for each prompt, and what goes beside them."""
    each, embeds = call["num_images_per_prompt"], call["prompt_embeds"]
    if each < 1:
        raise UserError(f"num_images_per_prompt {each} is not allowed: give at least 1")
    prompts = one_each(call["prompt"], 1 if embeds is None else len(embeds), "prompt")
    texts = {name: one_each(call[name], len(prompts), name) for name in TEXTS}
    count = len(prompts) * each
    generators = own_generators(call["generator"], count)
    seeds = own_seeds(call["seed"], generators, count)
    fields = {name: call[name] for name in Request.model_fields if name in call}
    aside = {field.name: call[field.name] for field in dataclasses.fields(Beside) if field.name in call}
    for name in ("image", "mask_image"):
        on_disk = isinstance(call[name], str | Path)
        fields[name], aside[name] = (str(call[name]), None) if on_disk else (None, call[name])
    for name in ("timesteps", "sigmas"):
        fields[name] = None if call[name] is None else tuple(call[name])
    if callable(call["sampler"]):
        fields["sampler"], aside["solver"] = None, call["sampler"]
    requests = []
    for p, prompt in enumerate(prompts):
        own: dict[str, Any] = {name: column[p] for name, column in texts.items()}
        own |= {"prompt": prompt or "", "seeds": seeds[p * each : (p + 1) * each]}
        requests.append(Request(**{**fields, **own}))
    return requests, Beside(generators=generators, **aside)


def one_each(text: str | Sequence[str] | None, count: int, name: str) -> list[str | None]:
    """One text for each of `count` prompts; for "prompt" as many as there are."""
    if text is None or isinstance(text, str):
        return [text] * count
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
