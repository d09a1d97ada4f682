"""What the U-Net is told of a picture: its texts, and what its config asks for beside them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.checkpoint import Parts
from ldm.errors import UserError
from ldm.memory.residence import in_use
from ldm.models.conditioning import Conditioning
from ldm.models.layers import timestep_features
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.model import Model
from ldm.prompts.grammar import Grammar
from ldm.prompts.text_encoder import TextEncoder
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.pipeline.image_prompts import ImagePrompts


TOLD = 64  # texts of prompts that are kept as embeddings: more than a batch has, whose steps all ask for them


@dataclass(frozen=True)
class Texts:
    """What a first text encoder reads in one step of a drawing, and what a second does."""

    prompts: tuple[str, ...]  # those that are composed
    negative: str
    prompts_2: tuple[str, ...]
    negative_2: str
    target: tuple[str, ...] = ()  # of an edit by inversion
    regions: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[list[str], list[str]]:
        """All that each encoder reads."""
        return (
            [*self.prompts, self.negative, *self.target, *self.regions],
            [*self.prompts_2, self.negative_2, *self.target, *self.regions],
        )


def texts_at(request: Request, step: int, steps: int) -> Texts:
    """What a resolved request says in step `step` (from 0) of `steps`."""
    prompts, negative, prompts_2, negative_2 = (script.at(step, steps) for script in request.scripts)
    target = () if request.target_prompt is None else (request.told(request.target_prompt),)
    regions = tuple(script.at(step, steps)[0] for script in request.region_scripts)
    return Texts(prompts, negative[0], prompts_2, negative_2[0], target, regions)


def windows_of(model: Model, request: Request, steps: int) -> int:
    """How many windows of the text encoders the longest text of any of `steps` steps needs."""
    said = {texts_at(request, step, steps) for step in range(steps)}
    grammar = request.grammar
    return max(model.text.count_windows(*texts.columns, grammar) for texts in said)


# `TextEncoder.encode`: prompts, clip_skip, windows, prompts_2, grammar -> a row for each prompt.
Read = Callable[[Sequence[str], int | None, int | None, Sequence[str], Grammar], Conditioning]


Text = tuple[str, str, int | None, int, Grammar]  # what a row depends on


class Reading:
    """Reads each text of a job once: its prompts most often share their negative one."""

    KEPT = 32  # texts, of which SDXL's take 0.6 MB each

    def __init__(self, text: TextEncoder) -> None:
        self._text = text
        self._kept = OrderedDict[Text, Conditioning]()

    def __call__(
        self,
        prompts: Sequence[str],
        clip_skip: int | None,
        windows: int | None,
        prompts_2: Sequence[str],
        grammar: Grammar,
    ) -> Conditioning:
        windows = windows or self._text.count_windows(prompts, prompts_2, grammar)
        texts = [(*each, clip_skip, windows, grammar) for each in zip(prompts, prompts_2, strict=True)]
        rows = {each: self._kept.pop(each) for each in dict.fromkeys(texts) if each in self._kept}
        if missing := [each for each in dict.fromkeys(texts) if each not in rows]:
            first, second, *_ = zip(*missing, strict=True)
            read = self._text.encode(first, clip_skip, windows, second, grammar)
            rows |= {each: read[i : i + 1] for i, each in enumerate(missing)}
        self._kept.update(rows)  # at the end, as the last that were asked for
        while len(self._kept) > self.KEPT:
            self._kept.popitem(last=False)
        return Conditioning.cat([rows[each] for each in texts])


class Telling:
    """What the U-Net is told of each prompt of a job in each step, encoded once while its texts stay."""

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        inputs: Inputs,
        steps: int,
        concat: Tensor | None = None,
        pictures: ImagePrompts | None = None,
    ) -> None:
        """`concat` [1, C, h, w] is beside all latents, `pictures` are told beside all texts."""
        self.concat = concat
        self.model, self.requests, self.inputs, self.steps = model, requests, inputs, steps
        self.pictures = pictures
        self._read = model.text.encode if len(requests) == 1 else Reading(model.text)
        self._encode = lru_cache(maxsize=TOLD)(self._encoded)
        self._without = lru_cache(maxsize=TOLD)(self._without_words)
        self._windows = cache(lambda p: windows_of(model, requests[p], steps))

    def __call__(self, p: int, step: int = 0, source: bool = False) -> tuple[Conditioning, Conditioning]:
        """(cond, uncond) of prompt `p` in a step: the same objects in all steps with the same texts.

        Raises UserError for embeddings that do not fit the model or each other.
        """
        return self._encode(p, texts_at(self.requests[p], step, self.steps), source)

    def empty(self, p: int, step: int) -> Conditioning:
        """What is told of no words at all, in the place of prompt `p`'s negative prompt of a step."""
        return self._without(p, texts_at(self.requests[p], step, self.steps))

    def shares(self, p: int) -> tuple[float, ...]:
        """Of the prompts that prompt `p` is composed of: the first rows of its cond; then come regions."""
        return self.requests[p].scripts[0].shares

    def length(self, p: int) -> int:
        """Of what is told of prompt `p`, in windows; embeddings that are given have one length."""
        return 1 if self.inputs.prompt_embeds is not None else self._windows(p)

    def _encoded(self, p: int, texts: Texts, source: bool) -> tuple[Conditioning, Conditioning]:
        """(cond, uncond), of equal length, with all that the U-Net is told beside the texts.

        cond has a row for each prompt that is composed, and one for each region. An edit's cond is of its
        target, or with `source` of the prompt that tells its image, as long as that.
        """
        extra, negative_extra = _extra(self.requests[p], self.model.parts, self.model.runtime.device)
        with self._awake():
            cond, uncond = self._given_or_read(p, texts, source)
        rows = {name: value.expand(len(cond), *value.shape[1:]) for name, value in extra.items()}
        cond, uncond = replace(cond, **rows), replace(uncond, **negative_extra)
        if self.concat is not None:
            beside = [self.concat.expand(len(each), -1, -1, -1) for each in (cond, uncond)]
            cond, uncond = replace(cond, concat=beside[0]), replace(uncond, concat=beside[1])
        return (cond, uncond) if self.pictures is None else self.pictures.tell(cond, uncond)

    def _awake(self) -> AbstractContextManager[object]:
        """The text encoders' weights are there."""
        model = self.model
        return in_use(model.text_encoder, model.text_encoder_2) if model.sleeps else nullcontext()

    def _given_or_read(self, p: int, texts: Texts, source: bool) -> tuple[Conditioning, Conditioning]:
        """(cond, uncond): embeddings that are given, and the others of their texts."""
        request, inputs, text, parts = self.requests[p], self.inputs, self.model.text, self.model.parts
        (first, second), count, device = texts.columns, len(texts.prompts), self.model.runtime.device
        cond = _given(p, device, inputs.prompt_embeds, inputs.pooled_prompt_embeds)
        uncond = _given(p, device, inputs.negative_prompt_embeds, inputs.negative_pooled_prompt_embeds)
        given = cond is not None or uncond is not None
        if cond is None:
            changes = any(script.changes for script in (*request.scripts, *request.region_scripts))
            windows = self._windows(p) if changes else None  # what all steps have
            rows = self._read(first, request.clip_skip, windows, second, request.grammar)
            shown = slice(count) if source or not texts.target else slice(count + 1, None)
            cond, encoded = rows[shown], rows[count : count + 1]
            cond = Conditioning.cat([cond, rows[count + 1 :]]) if texts.regions else cond
        absent = request.negative_prompt is None and request.negative_prompt_2 is None
        unused = not text.clips and (request.guidance_scale or 0) <= 1
        if uncond is None and absent and (parts.force_zeros_for_empty_prompt or unused):
            uncond = cond[:1].zeros()
        elif uncond is None and inputs.prompt_embeds is not None:
            windows = max(1, cond.tokens.shape[1] // text.window) if text.clips else 1
            negative = [texts.negative], request.clip_skip, windows, [texts.negative_2], request.grammar
            uncond = self._read(*negative)
        elif uncond is None:
            uncond = encoded
        if given:
            _check(cond, uncond, parts)
        return cond, uncond

    def _without_words(self, p: int, texts: Texts) -> Conditioning:
        """`uncond` of no words: zeros, where the model was trained with those (SDXL)."""
        request, text = self.requests[p], self.model.text
        uncond = self._encode(p, texts, False)[1]
        tokens = uncond.tokens
        if self.model.parts.force_zeros_for_empty_prompt:
            pooled = None if uncond.pooled is None else torch.zeros_like(uncond.pooled)
            return replace(uncond, tokens=torch.zeros_like(tokens), pooled=pooled)
        windows = max(1, tokens.shape[1] // text.window) if text.clips else 1
        with self._awake():
            read = text.encode([""], request.clip_skip, windows, grammar=request.grammar)
        return replace(uncond, tokens=read.tokens, pooled=read.pooled)


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
