"""From requests to the pictures they ask for, and to batches of pictures that can be drawn together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.arguments import Beside
from ldm.checkpoint import Parts
from ldm.conditioning import Conditioning, guidance_embedding, time_ids
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
    requests: Sequence[Request], beside: Beside, text: TextEncoder, parts: Parts, shape: tuple[int, int, int]
) -> list[Picture]:
    """Every picture of resolved requests, in order; `shape` [C, h, w] is one's latents'. Raises UserError."""
    pictures: list[Picture] = []
    for p, request in enumerate(requests):
        cond, uncond = _condition(request, _read(request, p, beside, text, parts), parts)
        pictures += [Picture(cond, uncond, seed) for seed in request.seeds]
    if beside.generators is not None:
        pictures = [replace(each, source=g) for each, g in zip(pictures, beside.generators, strict=True)]
    if beside.latents is None:
        return pictures
    given, wanted = list(beside.latents.shape), [len(pictures), *shape]
    if given != wanted:
        raise UserError(f"latents {given} are not allowed: these pictures need {wanted}")
    return [replace(each, latents=own) for each, own in zip(pictures, beside.latents, strict=True)]


def _condition(
    request: Request, read: tuple[Conditioning, Conditioning], parts: Parts
) -> tuple[Conditioning, Conditioning]:
    """(cond, uncond) with all that the U-Net's config asks for beside the text."""
    config, device = parts.unet.config, read[0].tokens.device
    both: list[dict[str, Tensor]] = [{}, {}]
    if "time_ids" in config.conditioning:
        for told, ids in zip(both, time_ids(request, parts.requires_aesthetics_score), strict=True):
            told["time_ids"] = ids.to(device)
    for told in both:
        if "class_labels" in config.conditioning:
            told["class_labels"] = torch.tensor([request.noise_level or 0], device=device)
        if config.time_cond_proj_dim is not None:
            given = request.guidance_scale
            scale = guidance_embedding(1.0 if given is None else given, config.time_cond_proj_dim)
            told["timestep_cond"] = scale.to(device)
    cond, uncond = (replace(text, **told) for text, told in zip(read, both, strict=True))
    return cond, uncond


def _read(
    request: Request, p: int, beside: Beside, text: TextEncoder, parts: Parts
) -> tuple[Conditioning, Conditioning]:
    """(cond, uncond) of the texts of prompt number `p`, of equal length, so that both fit one batch."""
    negative, negative_2 = request.negative_prompt, request.negative_prompt_2
    texts = [request.prompt, negative or ""]
    texts_2 = [request.prompt_2 or request.prompt, negative_2 or negative or ""]
    cond, uncond = beside.embeds(p, text.device)
    if cond is None:
        both = text.encode(texts, request.clip_skip, prompts_2=texts_2)
        cond, encoded = both[:1], both[1:]
    elif uncond is None:
        windows = max(1, cond.tokens.shape[1] // text.window)
        encoded = text.encode(texts[1:], request.clip_skip, windows, texts_2[1:])
    if uncond is None:
        nothing = negative is None and negative_2 is None
        uncond = encoded.zeros() if nothing and parts.force_zeros_for_empty_prompt else encoded
    _check(cond, uncond, text)
    return cond, uncond


def _check(cond: Conditioning, uncond: Conditioning, text: TextEncoder) -> None:
    if cond.tokens.shape != uncond.tokens.shape:
        raise UserError(
            f"the embeddings of prompt {list(cond.tokens.shape[1:])} and negative prompt "
            f"{list(uncond.tokens.shape[1:])} differ in shape: give both, alike"
        )
    width = cond.tokens.shape[-1]
    if width != text.width:
        raise UserError(f"an embedding of {width} channels does not fit this model's {text.width}")
    for name, each in (("pooled_prompt_embeds", cond), ("negative_pooled_prompt_embeds", uncond)):
        if (each.pooled is not None) != text.pools:
            raise UserError(f"{name} must be given beside the embeddings to SDXL models, and to them only")


def batches(pictures: Sequence[Picture], at_once: int) -> Iterator[list[Picture]]:
    """Neighbours, at most `at_once` of them.

    Padding a prompt to its neighbour's length would change its picture: only those of one length go together.
    """
    for _, alike in itertools.groupby(pictures, key=lambda picture: picture.cond.tokens.shape):
        group = list(alike)
        yield from (group[i : i + at_once] for i in range(0, len(group), at_once))
