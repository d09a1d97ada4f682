"""A drawing, decided: `ldm.pipeline.deciding` makes one, `ldm.pipeline.sample` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.control import Control
from ldm.diffusion.guidance import (
    Guidance,
)
from ldm.diffusion.noise import Seed
from ldm.diffusion.samplers import Sampler
from ldm.diffusion.schedule import Grid
from ldm.diffusion.tiles import Tiles
from ldm.models import UNet
from ldm.pipeline.conditioning import Telling
from ldm.pipeline.model import Model
from ldm.pipeline.networks import EXACT, Attending, Savings
from ldm.pipeline.start import FromNoise
from ldm.pipeline.steering.steering import UNSTEERED, Steering
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.pipeline.deciding.passes import Then


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a job: the number of its prompt, and what its noise comes from."""

    prompt: int
    prompt_request: Request  # of all pictures of that prompt
    seed: int
    source: int | Seed | torch.Generator  # of its noise
    latents: Tensor | None = None  # [C, h, w] unit noise, instead of what the source gives
    flagged: bool | None = None  # by the model's safety checker; None: it was not looked at
    is_source: bool = False  # of an edit between two prompts: drawn beside its target, under the prompt

    @property
    def request(self) -> Request:
        """The request that draws this picture alone."""
        return self.prompt_request.replace(seeds=(self.seed,), nsfw_content_detected=self.flagged)


Batch = tuple[Picture, ...]


@dataclass(frozen=True)
class Needs:
    """What a guidance wants of a drawing beside its U-Net and texts.

    networks: U-Nets that answer branches with their names after the colon. empty: whether there is a branch
    of no words. middle: whether it reads what the middle's attention gave.
    """

    networks: Mapping[str, UNet] = field(default_factory=dict)
    empty: bool = False
    middle: bool = False


NO_NEEDS = Needs()


@dataclass(frozen=True, eq=False)
class Job:
    """A drawing, decided: `ldm.pipeline.sample` needs nothing else."""

    model: Model  # with the LoRAs that the requests name
    requests: tuple[Request, ...]  # one for each prompt, all filled in, alike but for texts and seeds
    encode: Telling  # (prompt number, step) -> (cond, with a row for each prompt that is composed; uncond)
    sampler: Sampler
    options: Mapping[str, Any]  # of the sampler's solver
    grid: Grid
    guidance: Guidance
    start: FromNoise
    batches: tuple[Batch, ...]
    tiles: Tiles | None = None  # windows in which the U-Net sees its latents; None: whole
    then: Then | None = None  # what goes on from its latents
    savings: Savings = EXACT  # what the U-Net leaves out
    attending: tuple[Attending, ...] = ()  # what is done in attention's place
    steering: Steering = UNSTEERED
    needs: Needs = NO_NEEDS  # what a guidance by name wants beside the U-Net and the texts
    controls: tuple[Control, ...] = ()  # what shows the U-Net pictures

    @property
    def request(self) -> Request:
        """The first prompt's."""
        return self.requests[0]

    @property
    def looks_at_attention(self) -> bool:
        """Whether something is done in attention's place, for which layers take all rows at once."""
        return bool(self.attending) or self.steering.swap is not None or self.needs.middle

    @property
    def pictures(self) -> Batch:
        """All of them, in order."""
        return tuple(picture for batch in self.batches for picture in batch)

    def count_steps(self, batch: Batch) -> int:
        """Of a batch, with those of what goes on from it."""
        own, then = len(self.grid.timesteps), self.then
        return own if then is None else own + then.count_steps(len(batch))
