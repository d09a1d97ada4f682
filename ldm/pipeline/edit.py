"""Editing a photo by inversion: to the noise that draws it under one prompt, and back under another.

The picture's latents are inverted exactly (BDIA, `ldm.diffusion.inversion`) under the prompt that tells it,
without guidance, and drawn again over the same levels under `target_prompt`, with guidance. What the edit
does not touch is kept: the state there is the inversion's, whose end is the picture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.guidance import Predict, ToX0
from ldm.diffusion.inversion import bdia, bdia_invert, edit_mask, fading_gamma
from ldm.diffusion.noise import Noise
from ldm.diffusion.schedule import Grid
from ldm.diffusion.solvers import Denoise, Denoised, Solver, Step
from ldm.errors import UserError
from ldm.models import LatentDist
from ldm.models.conditioning import Conditioning
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.start import Beginning, FromNoise
from ldm.request import OF_MASKS, Request

SAMPLER = "ddim"  # whose levels an edit goes over, by BDIA's steps
STRENGTH = 0.8
STEPS = 20  # at least, by default: a model's own few are those of a sampler that adds noise
# Sigma above which a state in fp32 no longer holds the picture: that of zero terminal SNR.
HIDDEN = 1000.0
# What a call may give and an edit has no use for, by the names of the call's arguments.
UNUSED = ("prompt_embeds", "negative_prompt_embeds", "latents", "sampler")
UNUSED_FIELDS = tuple(name for name in OF_MASKS if name not in ("mask_invert", "mask_grow"))


@dataclass(frozen=True, eq=False)
class Invert(FromNoise):
    """An edit: the latents of the image, to be inverted by the branch "source" before "cond" draws."""

    pixels: Tensor  # [1 or prompts, 3, H, W] in 0..1
    mask: Tensor | None  # [1 or prompts, 1, H, W], 1 where it may change; None: where the texts differ
    source: Callable[[int], Conditioning]  # number of a prompt -> the text that tells the image
    encode: Callable[[], LatentDist]  # of all images, once: `finish` compares with them to the last bit
    prompts: tuple[int, ...] = ()  # of the pictures of a batch

    @property
    def x0(self) -> Tensor:
        """The latents of the image, or of each picture's own, [1 or B, C, h, w]."""
        every = self.encode().mean
        return every[list(self.prompts)] if len(every) > 1 else every

    def rows(self, prompts: Sequence[int]) -> Self:
        return replace(super().rows(prompts), prompts=tuple(prompts))

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        """The image's latents [B, C, h, w], without noise, and one more branch: "source"."""
        source = Conditioning.cat([self.source(p) for p in self.prompts])
        x = self.x0.expand(len(self.prompts), -1, -1, -1)
        return Beginning(x, {"cond": cond, "uncond": uncond, "source": source})

    def solver(self, predict: Predict, to_x0: ToX0) -> Solver:
        """What stands in the sampler's place: inverts the latents that it is given, then draws."""

        def alone(branch: str) -> Denoise:
            return lambda x, sigma: Denoised(to_x0(predict(x, sigma, (branch,))[branch], x, sigma))

        def edit(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, **_: Any) -> Iterator[Step]:
            gamma, source = fading_gamma(len(sigmas) - 1), alone("source")
            path = bdia_invert(source, x, sigmas, gamma)
            mask = self.latent_mask(x.shape[-2:])
            mask = edit_mask(source, alone("cond"), path, sigmas) if mask is None else mask.to(x.device)
            yield from bdia(denoise, path, sigmas, gamma, mask)

        return edit

    def latent_mask(self, size: Sequence[int]) -> Tensor | None:
        """Each latent [1 or B, 1, h, w] of which a pixel may change; None without a mask."""
        return None if self.mask is None else F.adaptive_max_pool2d(self.mask, list(size)) > 0

    def finish(self, images: Tensor, latents: Tensor) -> Tensor:
        """What is not changed has the photo's own pixels, with a soft edge unless the mask is the user's."""
        if self.mask is None:
            changed = (latents != self.x0).any(1, keepdim=True).float()
            around = F.max_pool2d(changed, 3, stride=1, padding=1)  # the decoder looks beyond a latent
            share = F.interpolate(around, images.shape[-2:], mode="bilinear")
        else:
            share = self.mask.to(images)
        return torch.where(share > 0, images.lerp(self.pixels.to(images), 1 - share), self.pixels.to(images))


def check_edit(requests: Sequence[Request], inputs: Inputs) -> None:
    """Raise UserError for what an edit cannot heed."""
    for request in requests:
        if request.target_prompt is None:
            raise UserError("prompts of one call are all edits, or none: give the others to another call")
        if len(request.seeds) > 1:
            raise UserError(
                f"{len(request.seeds)} seeds: an edit draws no noise, and every seed gives the same picture: "
                "ask for one"
            )
        unused = [name for name in inputs.given if name in UNUSED]
        if inputs.image_latents is not None:
            unused.append("latents as the image")
        if request.eta:
            unused.append("eta")
        unused += [name for name in UNUSED_FIELDS if getattr(request, name) is not None]
        if request.sampler not in (None, SAMPLER):
            unused.append(f"the sampler {request.sampler}")
        if unused:
            raise UserError(
                f"{unused[0]}: an edit inverts a picture by steps of its own, under texts: leave it out"
            )


def invertible(grid: Grid) -> Grid:
    """A grid that an inversion can go up: from the picture itself to a level that still holds it.

    Raises UserError where fewer than two steps are left.
    """
    grid = grid.last(len(grid.timesteps) - 1) if grid.sigmas[0] > HIDDEN else grid
    if len(grid.timesteps) < 2:
        raise UserError("an edit takes at least 2 steps within its strength: give more of either")
    return replace(grid, sigmas=torch.cat([grid.sigmas[:-1], grid.sigmas.new_zeros(1)]), final_scale=1.0)
