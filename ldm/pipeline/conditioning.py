"""What the U-Net is told of a picture: its texts, and what its config asks for beside them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ldm.checkpoint import Parts
from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.models.layers import timestep_features
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.model import Model
from ldm.request import Request


def encode_texts(
    model: Model, request: Request, inputs: Inputs, p: int, source: bool = False
) -> tuple[Conditioning, Conditioning]:
    """(cond, uncond) of a resolved request, number `p` of its job: one row each, of equal length.

    An edit's cond is of its target, or with `source` of the prompt that tells its image, as long as that.

    Raises UserError for embeddings that do not fit the model or each other.
    """
    extra, negative_extra = _extra(request, model.parts, model.runtime.device)
    cond, uncond = _read(model, request, inputs, p, source)
    return replace(cond, **extra), replace(uncond, **negative_extra)


def _read(
    model: Model, request: Request, inputs: Inputs, p: int, source: bool
) -> tuple[Conditioning, Conditioning]:
    """(cond, uncond): embeddings that are given, and the others of their texts."""
    text, (texts, texts_2), device = model.text, request.texts, model.runtime.device
    cond = _given(p, device, inputs.prompt_embeds, inputs.pooled_prompt_embeds)
    uncond = _given(p, device, inputs.negative_prompt_embeds, inputs.negative_pooled_prompt_embeds)
    given = cond is not None or uncond is not None
    if cond is None:
        read = text.encode(texts, request.clip_skip, prompts_2=texts_2)
        shown = slice(1) if source or request.target_prompt is None else slice(2, 3)
        cond, encoded = read[shown], read[1:2]
    absent = request.negative_prompt is None and request.negative_prompt_2 is None
    unused = not text.clips and (request.guidance_scale or 0) <= 1
    if uncond is None and absent and (model.parts.force_zeros_for_empty_prompt or unused):
        uncond = cond.zeros()
    elif uncond is None and inputs.prompt_embeds is not None:
        windows = max(1, cond.tokens.shape[1] // text.window) if text.clips else 1
        uncond = text.encode(texts[1:], request.clip_skip, windows, texts_2[1:])
    elif uncond is None:
        uncond = encoded
    if given:
        _check(cond, uncond, model.parts)
    return cond, uncond


def _given(p: int, device: torch.device, tokens: Tensor | None, pooled: Tensor | None) -> Conditioning | None:
    """Row `p` of the embeddings that are given, or their only row."""
    if tokens is None:
        return None
    row = slice(p, p + 1) if len(tokens) > 1 else slice(1)
    pooled = None if pooled is None else pooled[row].float().to(device)
    return Conditioning(tokens[row].float().to(device), pooled)


def _extra(request: Request, parts: Parts, device: torch.device) -> list[dict[str, Tensor]]:
    """What the U-Net's config asks for beside the text, for the prompt and for the negative one."""
    config = parts.unet.config
    both: list[dict[str, Tensor]] = [{}, {}]
    if "time_ids" in config.conditioning:
        for extra, ids in zip(both, time_ids(request, parts.requires_aesthetics_score), strict=True):
            extra["time_ids"] = ids.to(device)
    for extra in both:
        if "class_labels" in config.conditioning:
            extra["class_labels"] = torch.tensor([request.noise_level or 0], device=device)
        if config.time_cond_proj_dim is not None:
            scale = 1.0 if request.guidance_scale is None else request.guidance_scale
            extra["timestep_cond"] = guidance_embedding(scale, config.time_cond_proj_dim).to(device)
    return both


def _check(cond: Conditioning, uncond: Conditioning, parts: Parts) -> None:
    config = parts.unet.config
    if cond.tokens.shape != uncond.tokens.shape:
        raise UserError(
            f"the embeddings of prompt {list(cond.tokens.shape[1:])} and negative prompt "
            f"{list(uncond.tokens.shape[1:])} differ in shape: give both, alike"
        )
    width = cond.tokens.shape[-1]
    wanted = config.per_level("cross_attention_dim")[0]
    if width != wanted:
        raise UserError(f"an embedding of {width} channels does not fit this model's {wanted}")
    for name, each in (("pooled_prompt_embeds", cond), ("negative_pooled_prompt_embeds", uncond)):
        if (each.pooled is not None) != ("pooled" in config.conditioning):
            raise UserError(f"{name} must be given beside the embeddings to SDXL models, and to them only")


def time_ids(request: Request, aesthetic: bool) -> tuple[Tensor, Tensor]:
    """What SDXL is told of sizes, for the prompt and the negative prompt: [1, 6] each, in pixels.

    (original height, width, top, left, target height, width); with `aesthetic` a score takes the target's
    place: [1, 5]. Podell et al. 2023, "SDXL", section 2.2.
    """
    drawn = (request.height or 0, request.width or 0)
    original, target = request.original_size or drawn, request.target_size or drawn
    crop = request.crops_coords_top_left or (0, 0)
    score, negative_score = request.aesthetic_score or 0.0, request.negative_aesthetic_score or 0.0
    rows = [
        (*original, *crop, *((score,) if aesthetic else target)),
        (
            *(request.negative_original_size or original),
            *(request.negative_crops_coords_top_left or crop),
            *((negative_score,) if aesthetic else request.negative_target_size or target),
        ),
    ]
    ids = torch.tensor(rows, dtype=torch.float32)
    return ids[:1], ids[1:]


def guidance_embedding(guidance_scale: float, dim: int) -> Tensor:
    """What an LCM is told of the guidance that it was distilled with: [1, dim].

    Sines, then cosines, of ``1000 (guidance_scale - 1)`` times falling frequencies; Luo et al. 2023,
    "Latent Consistency Models", section 4.2, with the scale counted as elsewhere (1 is none).
    """
    return timestep_features(torch.tensor([1000 * (guidance_scale - 1)]), dim, False, 1)
