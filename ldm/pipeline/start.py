"""How pictures begin and end: from noise, from an image, beside an image, within a mask.

Each start is a frozen value of a `Job`. `begin` gives the first state, what a guidance may ask for, with what
is concatenated with the latents in every step, and what a mask keeps; `finish` the finished pictures. Images
are encoded at the first use, once for all batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.masked import Known
from ldm.diffusion.noise import Noise
from ldm.diffusion.schedule import Grid
from ldm.images.masks import Box, pasted
from ldm.models import VAE, LatentDist
from ldm.models.conditioning import Conditioning
from ldm.pipeline import networks

Branches = dict[str, Conditioning]  # what a guidance may ask for, by name


@dataclass(frozen=True, eq=False)
class Beginning:
    """What the solver of a batch begins with, and what its denoiser is made of."""

    x: Tensor  # the first state [B, C, h, w]
    branches: Branches
    known: Known | None = None  # what is put back at every noise level


@dataclass(frozen=True, eq=False)
class FromNoise:
    """Text to image: the first state is noise alone."""

    shape: tuple[int, int, int]  # of one picture's latents [C, h, w]
    grid: Grid
    device: torch.device

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        """The first state, and the branches with the text ("cond") and without ("uncond").

        `given` is unit noise in place of what `noise` gives. Draws from each picture's generator in
        diffusers' order.
        """
        return Beginning(self.grid.initial_scale * self.unit(noise, given), {"cond": cond, "uncond": uncond})

    def unit(self, noise: Noise, given: Tensor | None) -> Tensor:
        """Unit noise [B, C, h, w], drawn if it is not given."""
        return (noise.first(self.shape) if given is None else given).to(self.device, torch.float32)

    def finish(self, images: Tensor, latents: Tensor) -> Tensor:
        """Finished pictures [B, 3, H, W] in 0..1 of decoded ones; `latents` are what was decoded."""
        return images

    def rows(self, prompts: Sequence[int]) -> Self:
        """This start for pictures of these prompts: a row for each where each prompt has its own image."""
        return rows_of(self, prompts)


@dataclass(frozen=True, eq=False)
class Place:
    """Where what is drawn lies in a picture: `ldm.images.masks.pasted`."""

    picture: Tensor  # [1 or prompts, 3, H, W] in 0..1
    share: Tensor  # [1 or prompts, 1, H, W], of each pixel what is drawn
    box: Box | None = None

    def paste(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] in its place, [B, 3, H, W]."""
        return pasted(images, self.picture, self.share, self.box)

    def rows(self, prompts: Sequence[int]) -> Self:
        """This place for pictures of these prompts."""
        return rows_of(self, prompts)


Rows = TypeVar("Rows", bound="FromNoise | Place")


def rows_of(values: Rows, prompts: Sequence[int]) -> Rows:
    """A dataclass whose tensors [prompts, ...] have a row for each of `prompts`; those of one row stay."""
    given = {each.name: getattr(values, each.name) for each in fields(values)}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    own: dict[str, Any] = {name: t[list(prompts)] for name, t in tensors.items() if len(t) > 1}
    return replace(values, **own) if own else values


@dataclass(frozen=True, eq=False)
class FromImage(FromNoise):
    """Image to image: an image's latents, noised to the first level of the grid."""

    vae: VAE
    pixels: Tensor  # [1 or prompts, 3, H, W] in 0..1
    # Whether the latents of `pixels` are sampled with noise of each picture's own, as of a variational VAE.
    samples: bool = field(default=True, kw_only=True)

    @cached_property
    def latents(self) -> LatentDist:
        """Of the image, [1, c, h, w] each."""
        return networks.encode(self.vae, self.pixels)

    def sample(self, encoded: LatentDist, noise: Noise) -> Tensor:
        """Latents of an encoded picture: a sample for each picture that is drawn, or for all the mean."""
        return encoded.sample(noise.initial(self.shape)) if self.samples else encoded.mean

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        x0 = self.sample(self.latents, noise)
        x = x0 + float(self.grid.sigmas[0]) * self.unit(noise, given)
        return Beginning(x, {"cond": cond, "uncond": uncond})


@dataclass(frozen=True, eq=False)
class FromSmaller(FromImage):
    """Image to image: the latents of an image of another size, resized (A1111's resize mode 3)."""

    @cached_property
    def latents(self) -> LatentDist:
        own = networks.encode(self.vae, self.pixels)
        size = self.shape[1:]
        return LatentDist(*(F.interpolate(each, size, mode="bilinear") for each in (own.mean, own.std)))


@dataclass(frozen=True, eq=False)
class FromLatents(FromNoise):
    """Image to image from latents that the caller has: nothing is encoded, and no noise drawn for it."""

    image_latents: Tensor  # [1 or prompts, C, h, w], scaled as the U-Net has them

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        x = self.image_latents.to(self.device) + float(self.grid.sigmas[0]) * self.unit(noise, given)
        return Beginning(x, {"cond": cond, "uncond": uncond})


@dataclass(frozen=True, eq=False)
class Edit(FromImage):
    """instruct-pix2pix: noise, with the latents of the picture to change beside it."""

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        """A third branch, "image", has the image without the text; without the text "uncond" has neither."""
        begun = FromNoise.begin(self, noise, given, cond, uncond)
        # These latents are not scaled: so the models were trained.
        latents = self.latents.mean / self.vae.scaling_factor + self.vae.shift_factor
        concat = latents.expand(len(begun.x), -1, -1, -1)
        branches = {
            "cond": replace(cond, concat=concat),
            "image": replace(uncond, concat=concat),
            "uncond": replace(uncond, concat=torch.zeros_like(concat)),
        }
        return replace(begun, branches=branches)


@dataclass(frozen=True, eq=False)
class Enlarge(FromNoise):
    """Upscalers: noise, with the small picture beside it, noised to its own level."""

    low_res: Tensor  # [1, 3, h, w] in -1..1
    signal: float  # alphas_cumprod of its noise level

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        low_noise = noise.initial((3, *self.shape[1:])).to(self.device)
        concat = self.signal**0.5 * self.low_res + (1 - self.signal) ** 0.5 * low_noise
        return super().begin(noise, given, replace(cond, concat=concat), replace(uncond, concat=concat))


@dataclass(frozen=True, eq=False)
class Masked(FromImage):
    """Any text-to-image model within a mask: what the mask keeps is put back at every noise level."""

    mask: Tensor  # [1 or prompts, 1, H, W], 1 where it is drawn anew, else 0; between them of a soft mask
    place: Place  # of what is drawn in the picture
    keeps_image: bool  # whether what the mask covers begins with the image too
    fill: str = "original"  # with what of it: `pixels` as they are, or "noise" or "nothing" in their latents

    @property
    def small(self) -> Tensor:
        """The mask at the size of latents, its nearest pixels, [1 or prompts, 1, h, w]."""
        return F.interpolate(self.mask, self.shape[1:]).to(self.device)

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        x0 = self.sample(self.latents, noise)
        unit = self.unit(noise, given)
        if self.samples:
            noise.initial(self.shape)  # diffusers has a sample of the masked picture too, and no use for it
        known = Known(self.grid, x0, unit, self.small)
        return Beginning(self.first(x0, unit), {"cond": cond, "uncond": uncond}, known)

    def first(self, x0: Tensor, unit: Tensor) -> Tensor:
        """The first state: noise alone, or on the image, or on what lies beneath the mask in its place."""
        beneath = {"noise": unit, "nothing": torch.zeros_like(unit)}.get(self.fill)
        below = x0 if beneath is None else torch.where(self.small > 0, beneath, x0)
        noised = below + float(self.grid.sigmas[0]) * unit
        if self.keeps_image:
            return noised
        later = (self.small > 0) & (self.small < 1)  # kept at first, and drawn from there on
        return torch.where(later, noised, self.grid.initial_scale * unit)

    def finish(self, images: Tensor, latents: Tensor) -> Tensor:
        """What the mask does not cover is as it was."""
        return self.place.paste(images)

    def rows(self, prompts: Sequence[int]) -> Self:
        return replace(super().rows(prompts), place=self.place.rows(prompts))


@dataclass(frozen=True, eq=False)
class Inpaint(Masked):
    """Inpainting models: noise or the noised image, with a mask and what it leaves beside it."""

    @cached_property
    def masked(self) -> LatentDist:
        """Of the picture, grey where it is drawn anew."""
        return networks.encode(self.vae, torch.where(self.mask > 0, 0.5, self.pixels))

    def begin(
        self, noise: Noise, given: Tensor | None, cond: Conditioning, uncond: Conditioning
    ) -> Beginning:
        x0 = self.sample(self.latents, noise) if self.keeps_image else None
        unit = self.unit(noise, given)
        masked = self.sample(self.masked, noise)
        concat = torch.cat([each.expand(len(unit), -1, -1, -1) for each in (self.small, masked)], 1)
        branches = {"cond": replace(cond, concat=concat), "uncond": replace(uncond, concat=concat)}
        return Beginning(self.first(unit if x0 is None else x0, unit), branches)
