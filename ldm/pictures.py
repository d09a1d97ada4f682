"""From requests to the pictures they ask for, and to batches of pictures that can be drawn together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.arguments import Beside
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.request import Request
from ldm.text import TextEncoder


@dataclass(frozen=True)
class Picture:
    """One picture to draw."""

    cond: Conditioning  # of one row
    uncond: Conditioning
    source: int | torch.Generator  # of its noise
    latents: Tensor | None = None  # [C, h, w] unit noise, instead of what the source gives


def list_pictures(
    requests: Sequence[Request], beside: Beside, text: TextEncoder, shape: tuple[int, int, int]
) -> list[Picture]:
    """Every picture of the requests, in order; `shape` [C, h, w] is of one's latents. Raises UserError."""
    pictures: list[Picture] = []
    for p, request in enumerate(requests):
        cond, uncond = _encode(request, p, beside, text)
        pictures += [Picture(cond, uncond, seed) for seed in request.seeds]
    if beside.generators is not None:
        pictures = [replace(each, source=g) for each, g in zip(pictures, beside.generators, strict=True)]
    if beside.latents is None:
        return pictures
    given, wanted = list(beside.latents.shape), [len(pictures), *shape]
    if given != wanted:
        raise UserError(f"latents {given} are not allowed: these pictures need {wanted}")
    return [replace(each, latents=own) for each, own in zip(pictures, beside.latents, strict=True)]


def _encode(request: Request, p: int, beside: Beside, text: TextEncoder) -> tuple[Conditioning, Conditioning]:
    """(cond, uncond) of prompt number `p`, of equal length, so that both fit one batch."""
    skip, embeds, negative = request.clip_skip, beside.prompt_embeds, beside.negative_prompt_embeds
    if embeds is None:
        both = text.encode([request.prompt, request.negative_prompt], skip)
        cond, uncond = both[:1], both[1:]
    else:
        cond = embeds[p : p + 1].float().to(text.device)
        if negative is None:
            uncond = text.encode([request.negative_prompt], skip, max(1, cond.shape[1] // text.window))
    if negative is not None:
        uncond = negative[p if len(negative) > 1 else 0][None].float().to(text.device)
    if cond.shape != uncond.shape:
        raise UserError(
            f"the embeddings of prompt {list(cond.shape[1:])} and negative prompt {list(uncond.shape[1:])} "
            "differ in shape: give both, alike"
        )
    if cond.shape[-1] != text.width:
        raise UserError(f"an embedding of {cond.shape[-1]} channels does not fit this model's {text.width}")
    return Conditioning(cond), Conditioning(uncond)


def batches(pictures: Sequence[Picture], at_once: int) -> Iterator[list[Picture]]:
    """Neighbours, at most `at_once` of them.

    Padding a prompt to its neighbour's length would change its picture: only those of one length go together.
    """
    for _, alike in itertools.groupby(pictures, key=lambda picture: picture.cond.tokens.shape):
        group = list(alike)
        yield from (group[i : i + at_once] for i in range(0, len(group), at_once))
