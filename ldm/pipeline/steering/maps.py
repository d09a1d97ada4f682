"""Which places of a picture each word of its prompt drew: Tang et al. 2022, "What the DAAM", section 3.

For each place the share that it gives each token in cross-attention, averaged over heads, layers and steps.
DAAM sums them and resizes by cubic curves; a mean by straight lines keeps shares that sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.images.sheet import captioned, table
from ldm.models.attention import Attend, Site
from ldm.models.conditioning import Conditioning
from ldm.pipeline.networks import is_compiled
from ldm.pipeline.steering.layers import attention_layers, probabilities
from ldm.prompts.words import words_of

if TYPE_CHECKING:
    from ldm.pipeline.job import Batch, Job

COLUMNS = 4  # of a sheet of heat maps


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Of the pictures of a request."""

    words: tuple[str, ...]  # of the prompt, in their order
    maps: Tensor  # [B, words, H, W]: at each pixel the share of attention that a word had, 0..1
    tokens: Tensor  # [B, N, h, w]: the same of all tokens by latents, with start, end and padding: sums to 1
    images: tuple[Image.Image, ...]
    batch: Batch  # what was drawn, with what a safety checker found

    def sheets(self) -> list[Image.Image]:
        """For each picture one with a heat map of each word laid over it, the brightest where it is most."""
        return [heat_sheet(image, self.words, own) for image, own in zip(self.images, self.maps, strict=True)]


class Recorder:
    """What cross-attention gives the tokens of "cond" in one batch: it looks, and changes nothing.

    Args:
        size: (h, w) of latents. layers: full names of those that are looked at; None: all.
    """

    def __init__(self, size: tuple[int, int], layers: frozenset[str] | None = None) -> None:
        self.size, self.layers = size, layers
        self.total: Tensor | None = None
        self.count = 0

    def attending(self, names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend:
        """An `ldm.pipeline.networks.Attending`."""
        if "cond" not in names:
            return base
        rows, at = len(cond) // len(names), names.index("cond")
        own = slice(at * rows, (at + 1) * rows)

        def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if site.cross and (self.layers is None or site.layer.name in self.layers):
                self._add(probabilities(q[own], k[own]), site.size)
            return base(site, q, k, v)

        return attend

    def _add(self, shares: Tensor, size: tuple[int, int]) -> None:
        """[B, heads, H W, N] of a layer in a step."""
        maps = shares.mean(1).transpose(1, 2).reshape(len(shares), -1, *size)
        maps = F.interpolate(maps, self.size, mode="bilinear")
        self.total = maps if self.total is None else self.total + maps
        self.count += 1

    @property
    def tokens(self) -> Tensor:
        """[B, N, h, w] on the CPU."""
        assert self.total is not None
        return (self.total / self.count).cpu()


Draw = Callable[["Job", "Batch"], tuple[Sequence[Image.Image], "Batch"]]


def record(job: Job, batch: Batch, draw: Draw, layers: Sequence[str] = ()) -> AttentionMaps:
    """The maps of a batch of pictures of one prompt, which `draw` draws as without.

    Args:
        layers: "mid", "down.1", "up.0", ...; by default all.
    """
    check(job)
    unet, (height, width) = job.model.unet, job.start.shape[1:]
    chosen = attention_layers(unet, layers, cross=True) if layers else None
    recorder = Recorder((height, width), chosen)
    images, batch = draw(replace(job, attending=(*job.attending, recorder.attending)), batch)
    request = job.requests[batch[0].prompt]
    found = words_of(job.model.text.clips[0], request.told(request.prompt), request.grammar)
    tokens = recorder.tokens
    words = torch.stack([tokens[:, list(word.places)].sum(1) for word in found], 1)
    maps = F.interpolate(words, images[0].size[::-1], mode="bilinear")
    return AttentionMaps(tuple(word.text for word in found), maps, tokens, tuple(images), batch)


def record_all(job: Job, draw: Draw, layers: Sequence[str] = ()) -> AttentionMaps:
    """`record` of all batches of a job."""
    made = [record(job, batch, draw, layers) for batch in job.batches]
    images = tuple(image for each in made for image in each.images)
    batch = tuple(picture for each in made for picture in each.batch)
    maps, tokens = (torch.cat([getattr(each, name) for each in made]) for name in ("maps", "tokens"))
    return AttentionMaps(made[0].words, maps, tokens, images, batch)


def check(job: Job) -> None:
    """Raise UserError for a drawing whose attention says nothing of the words of one prompt."""
    request = job.request
    reasons = {
        "tile_size": job.tiles is not None,
        "regions": bool(request.regions),
        "prompt_embeds": "prompt_embeds" in request.not_kept,
        "target_prompt": request.target_prompt is not None,
        "a prompt that changes over the steps, or is composed by AND": not request.scripts[0].is_one,
        "pipe.compiled()": is_compiled(job.model.unet),
    }
    for name, is_so in reasons.items():
        if is_so:
            raise UserError(
                f"attention maps are of the words of one prompt over the whole picture: not {name}"
            )
    if len({picture.prompt for picture in job.pictures}) > 1:
        raise UserError("attention maps are of one prompt: give the others to other calls")
    if not words_of(job.model.text.clips[0], request.told(request.prompt), request.grammar):
        raise UserError("attention maps need a prompt with words")


def heat_sheet(image: Image.Image, words: Sequence[str], maps: Tensor) -> Image.Image:
    """A picture, and over each word what it drew, [words, H, W]: blue where least, red where most."""
    cells = [captioned(image, "all")]
    cells += [captioned(heated(image, one), word) for word, one in zip(words, maps, strict=True)]
    return table([cells[k : k + COLUMNS] for k in range(0, len(cells), COLUMNS)])


def heated(image: Image.Image, heat: Tensor) -> Image.Image:
    """A picture in grey, with a word's map [H, W] over it from blue through yellow to red."""
    low, high = float(heat.min()), float(heat.max())
    at = ((heat - low) / max(high - low, 1e-12)).numpy()[..., None]
    stops = np.array([[30, 30, 120], [40, 160, 190], [250, 230, 90], [200, 30, 30]], np.float32)
    place = at[..., 0] * (len(stops) - 1)
    below = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - below)[..., None]
    colour = stops[below] * (1 - part) + stops[below + 1] * part
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    return Image.fromarray((0.55 * colour + 0.45 * grey).round().astype(np.uint8))
