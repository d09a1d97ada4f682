"""One picture under two prompts: the second is drawn beside the first, and attends as that does at first.

Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control": in the first share of the
steps a target's cross-attention has the source's maps, so that its words lie where the source's do (equation
1: a swap of words; 2: a refinement, where new words keep their own maps; 3: words reweighted), and in a
smaller share small layers have the source's self-attention. Both begin with the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.guidance import Predict, text_of
from ldm.diffusion.noise import Seed
from ldm.diffusion.schedule import Grid
from ldm.errors import UserError, printable
from ldm.models.attention import Attend, Site
from ldm.models.conditioning import Conditioning
from ldm.pipeline.conditioning import Telling
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.model import Model
from ldm.pipeline.steering.layers import probabilities
from ldm.prompts.text_encoder import Clip
from ldm.prompts.words import Word, matched, words_of
from ldm.request import Request

CROSS_STEPS, SELF_STEPS = 0.8, 0.4  # by default, as in the paper's own notebooks
SMALL = 16  # self-attention is the source's where latents have so many times its pixels: 16 x 16 of 64 x 64
# What says how, and means nothing without a target, or beside a picture, which is edited by inversion.
FIELDS = ("cross_replace_steps", "self_replace_steps", "word_weights")


def resolved(request: Request, has_image: bool) -> Request:
    """A request with the shares of an edit between two prompts. Raises UserError where it is none."""
    if request.target_prompt is None or has_image:
        for name in FIELDS:
            if getattr(request, name) is not None:
                advice = "leave the image out" if has_image else "give one (--to), or the same prompt"
                raise UserError(f"{name} is not allowed here: it goes with a target_prompt alone: {advice}")
        return request
    cross, own = request.cross_replace_steps, request.self_replace_steps
    return request.replace(
        cross_replace_steps=CROSS_STEPS if cross is None else cross,
        self_replace_steps=SELF_STEPS if own is None else own,
    )


def check_swap(requests: Sequence[Request], inputs: Inputs) -> None:
    """Raise UserError for what cannot be beside an edit between two prompts."""
    for request in requests:
        if request.target_prompt is None:
            raise UserError("prompts of one call are all edits, or none: give the others to another call")
    if inputs.prompt_embeds is not None or inputs.negative_prompt_embeds is not None:
        raise UserError("target_prompt is a text beside the prompt: give both as texts, not as prompt_embeds")


@dataclass(frozen=True, eq=False)
class Matched:
    """Of a prompt and its target: which token of the target takes the map of which of the source."""

    matrix: Tensor  # [N, N]: a source's token (row) -> the target's (column)
    takes: Tensor  # [N]: 1 where the target's token takes the source's map, 0 where it keeps its own
    factors: Tensor  # [N], of the maps


@dataclass(frozen=True, eq=False)
class Swap:
    """An edit between two prompts, for a job: `begin` gives what one drawing needs."""

    mappings: tuple[Matched, ...]  # by prompt
    cross_until: float  # noise levels above which maps are the source's
    self_until: float
    pixels: int  # of latents

    def begin(self, prompts: Sequence[int], device: torch.device) -> Swapping:
        """For pictures of these prompts."""
        chosen = [self.mappings[p] for p in prompts]
        matrix, takes, factors = (
            torch.stack([getattr(each, name) for each in chosen]).to(device)
            for name in ("matrix", "takes", "factors")
        )
        return Swapping(self, matrix[:, None], takes[:, None, None], factors[:, None, None])


class Swapping:
    """What attention does in one drawing, whose rows of a branch are the sources', then the targets'."""

    def __init__(self, swap: Swap, matrix: Tensor, takes: Tensor, factors: Tensor) -> None:
        self.swap, self.matrix, self.takes, self.factors = swap, matrix, takes, factors
        self.sigma = float("inf")  # of the call that is made

    def around(self, predict: Predict) -> Predict:
        """`predict`, whose noise levels are heard."""

        def call(x: Tensor, sigma: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
            self.sigma = float(sigma)
            return predict(x, sigma, names)

        return call

    def attending(self, names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend:
        """An `ldm.pipeline.networks.Attending`, which acts in the branches with the text."""
        half = len(cond) // len(names) // 2
        begins = [2 * half * k for k, name in enumerate(names) if text_of(name) == "cond"]
        pairs = [(slice(b, b + half), slice(b + half, b + 2 * half)) for b in begins]

        def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if site.cross and self.sigma > self.swap.cross_until:
                out = base(site, q, k, v).clone()
                for source, target in pairs:
                    out[target] += self._change(q, k, v, source, target).to(out.dtype)
                return out
            small = SMALL * site.size[0] * site.size[1] <= self.swap.pixels
            if not site.cross and small and self.sigma > self.swap.self_until:
                q, k = q.clone(), k.clone()
                for source, target in pairs:
                    q[target], k[target] = q[source], k[source]
            return base(site, q, k, v)

        return attend

    def _change(self, q: Tensor, k: Tensor, v: Tensor, source: slice, target: slice) -> Tensor:
        """What the maps of their sources change of what the targets attend to: [B, heads, N, d].

        So what else is added there, of an image prompt say, stays.
        """
        theirs, own = probabilities(q[source], k[source]), probabilities(q[target], k[target])
        shares = torch.lerp(own, theirs @ self.matrix, self.takes.expand_as(own))
        return (shares * self.factors - own) @ v[target].float()


def swap_of(model: Model, requests: Sequence[Request], telling: Telling, grid: Grid) -> Swap:
    """The edit of resolved requests. Raises UserError for a weight of a word that no target has."""
    first, n = requests[0], len(grid.timesteps)
    clip, levels = model.text.clips[0], grid.sigmas.tolist()
    # As in the paper's code: of n steps those before int(share (n + 1)), and int(share n).
    cross, own = int((first.cross_replace_steps or 0) * (n + 1)), int((first.self_replace_steps or 0) * n)
    height, width = (side // model.vae.downscale for side in first.size)
    mappings = tuple(
        mapping_of(clip, each, telling.length(p) * clip.window) for p, each in enumerate(requests)
    )
    until = [(1 + 1e-6) * levels[min(count, n)] for count in (cross, own)]
    return Swap(mappings, until[0], until[1], pixels=height * width)


def mapping_of(clip: Clip, request: Request, length: int) -> Matched:
    """From the prompt of a request to its target, of embeddings of that length."""
    said = (request.prompt, request.target_prompt or "")
    texts = [words_of(clip, request.told(text), request.grammar) for text in said]
    matrix, takes = torch.zeros(length, length), torch.ones(length)
    ends = [[_end(words, begin, clip.window) for begin in range(0, length, clip.window)] for words in texts]
    for number, (end, target_end) in enumerate(zip(*ends, strict=True)):
        begin = number * clip.window
        matrix[begin, begin] = matrix[end, target_end] = 1
        for place in range(target_end + 1, begin + clip.window):  # padding
            matrix[max(place, end), place] = 1
    for source, target in matched(*texts):
        places = list(target.places)
        if source is None:
            takes[places] = 0
        elif len(source.places) == len(places):
            matrix[list(source.places), places] = 1
        else:
            matrix[torch.tensor(source.places)[:, None], places] = 1 / len(places)
    weights = {request.told(word): weight for word, weight in request.word_weights or ()}
    return Matched(matrix, takes, _factors(texts[1], weights, length))


def _end(words: Sequence[Word], begin: int, window: int) -> int:
    """The place after the last word in the window that begins there."""
    inside = [place for word in words for place in word.places if begin < place < begin + window]
    return max(inside, default=begin) + 1


def _factors(words: Sequence[Word], weights: Mapping[str, float], length: int) -> Tensor:
    factors = torch.ones(length)
    for asked, weight in weights.items():
        places = [place for word in words if word.text == asked.strip().lower() for place in word.places]
        if not places:
            there = ", ".join(dict.fromkeys(word.text for word in words))
            raise UserError(
                f"word_weights {printable(asked)} is not allowed: the target prompt's words are {there}"
            )
        factors[places] = weight
    return factors


def again(source: int | Seed | torch.Generator) -> int | Seed | torch.Generator:
    """What a picture's noise comes of, once more: generators are copied as they are now."""
    if isinstance(source, torch.Generator):
        return torch.Generator(source.device).set_state(source.get_state())
    return source
