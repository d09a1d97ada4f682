"""The bound on ``-log p`` of pictures of 8 bits, through the VAE, term by term.

The model is the one that draws: DDPM's sampler of so many steps, whose last guess is decoded, and a Gaussian
about that, without which no picture has a probability. A VAE of Stable Diffusion has no such variance, so it
is fitted: of all variances, the mean squared error makes the pictures likeliest.

With z_1 ... z_T the states of the sampler, from the lowest level up, and z_0 what the picture encodes to:

    -log p(x) <= E[-log p(x | z_1)] + sum of KL(q(z_s | z_t, z_0) || p(z_s | z_t))
                 + KL(q(z_T | z_0) || p(z_T)) - sum of log(1 + s^2 / sigma_1^2) / 2

The last term is what the encoder's own spread s is worth: the entropy of q(z_1 | x) is that much larger than
that of q(z_1 | z_0). Without a spread (AutoencoderTiny) it is 0, q(z_1 | x) is the encoder's point with the
noise of the lowest level, and all is a true bound still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.bound import bits_per_dim, bound
from ldm.diffusion.forward import Gaussian
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import Denoise
from ldm.errors import UserError
from ldm.evaluate.likelihood import fit, own_size, under
from ldm.models import LatentDist
from ldm.pipeline import Pipeline

LEVELS = 255  # of 8 bits: a level is this share of black to white


@dataclass(frozen=True, eq=False)
class Draw:
    """One draw of what the bounds of N pictures are made of; nats, float64, on the CPU."""

    sigmas: Tensor  # [T], falling: the levels of the sampler
    prior: Tensor  # [N]
    steps: Tensor  # [T - 1, N]: of the step down from each level but the last
    encoder: Tensor  # [N]: at most 0
    z_0: Tensor  # [N, c, h, w]
    guess: Tensor  # [N, c, h, w]: of z_0, from z_1
    decoded: Tensor  # [N, 3, H, W] in 0..1, of the guess


@dataclass(frozen=True, eq=False)
class Bounds:
    """The terms of N pictures' bounds, in nats [N], and the standard deviations that were fitted."""

    sigmas: Tensor  # [T]
    prior: Tensor
    steps: Tensor  # [T - 1, N]
    encoder: Tensor
    latent_decoder: Tensor  # -log p(z_0 | z_1), in place of `encoder` and `pixels` where z_0 is all there is
    pixels: Tensor  # -log P(x | z_1)
    latent_std: float  # of p(z_0 | z_1)
    pixel_std: float  # of p(x | z_1), in levels of 255
    latent_dims: int
    pixel_dims: int

    @property
    def latents(self) -> Tensor:
        """At least ``-log p(z_0)``, bits for each dimension of the latents, [N]."""
        return bits_per_dim(self.prior + self.steps.sum(0) + self.latent_decoder, self.latent_dims)

    @property
    def pictures(self) -> Tensor:
        """At least ``-log P(x)`` of the 8-bit pixels, bits for each of their channels, [N]."""
        return bits_per_dim(self.prior + self.steps.sum(0) + self.encoder + self.pixels, self.pixel_dims)

    def terms(self) -> dict[str, tuple[float, float]]:
        """Name -> means over the pictures: bits per dimension of the latents, and of the pixels."""
        nats = {
            "prior": self.prior,
            "steps": self.steps.sum(0),
            "latents' decoder": self.latent_decoder,
            "encoder": self.encoder,
            "pixels": self.pixels,
        }
        return {
            name: (
                float(bits_per_dim(value, self.latent_dims).mean()),
                float(bits_per_dim(value, self.pixel_dims).mean()),
            )
            for name, value in nats.items()
        }


def picture_bounds(
    pipe: Pipeline,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    steps: int = 100,
    seed: int = 0,
    pixel_std: float | None = None,
    latent_std: float | None = None,
) -> Bounds:
    """Each picture's bound under its prompt, one draw; picture k draws with seed + k.

    Fewer steps make another model, and a higher bound. Pictures are fitted to the model's size.

    Args:
        pixel_std: of the decoder, in levels of 255; by default fitted to these pictures, one number for all:
            a picture alone gives itself a few nats by it.
        latent_std: of the decoder of the latents, likewise.

    Raises:
        UserError: for a model that does not draw from text alone, or a number of steps that is no grid.
    """
    if steps < 2:
        raise UserError(f"a bound of {steps} steps is not allowed: give at least 2")
    size = own_size(pipe)
    x = torch.cat([fit(picture, size) for picture in pictures])
    sigmas, groups = under(pipe, prompts, size, steps)
    parts = [
        draw(g.denoise, pipe.encode(x[g.rows]), pipe.decode, sigmas, Noise([seed + k for k in g.rows]))
        for g in groups
    ]
    columns = ("prior", "steps", "encoder", "z_0", "guess", "decoded")
    joined = {
        name: torch.cat([getattr(part, name) for part in parts], int(name == "steps")) for name in columns
    }
    return bounds_of(Draw(parts[0].sigmas, **joined), x, pixel_std, latent_std)


def draw(
    denoise: Denoise,
    encoded: LatentDist,
    decode: Callable[[Tensor], Tensor],
    sigmas: Tensor,
    noise: Noise,
) -> Draw:
    """One draw of the terms for pictures that encode to `encoded`; levels and noise as for `bound`.

    Args:
        decode: latents [B, c, h, w] -> pictures [B, 3, H, W] in 0..1.
    """
    levels = sigmas[sigmas > 0]
    last = levels[-1]
    with torch.no_grad():
        z_0 = encoded.sample(noise(encoded.mean, 0.0, 0.0))
        found = [term.nats.cpu() for term in islice(bound(denoise, z_0, sigmas, noise), len(levels))]
        guess = denoise(z_0 + last.to(z_0) * noise(z_0, float(last), 0.0), last).x0
        decoded = decode(guess)
    spread = (1 + (encoded.std.double() / float(last)) ** 2).log().expand(z_0.shape).sum((1, 2, 3))
    return Draw(
        levels, found[0], torch.stack(found[1:]), -spread.cpu() / 2, z_0.cpu(), guess.cpu(), decoded.cpu()
    )


def bounds_of(
    drawn: Draw, x: Tensor, pixel_std: float | None = None, latent_std: float | None = None
) -> Bounds:
    """The bounds of pictures x [N, 3, H, W] in 0..1; standard deviations that are not given are fitted."""
    if latent_std is None:
        latent_std = float((drawn.guess - drawn.z_0).double().square().mean().sqrt())
    if pixel_std is None:
        pixel_std = LEVELS * float((drawn.decoded - x).double().square().mean().sqrt())
    about = Gaussian(drawn.guess.double(), torch.tensor(2 * math.log(latent_std), dtype=torch.float64))
    return Bounds(
        sigmas=drawn.sigmas,
        prior=drawn.prior,
        steps=drawn.steps,
        encoder=drawn.encoder,
        latent_decoder=-about.log_prob(drawn.z_0.double()).flatten(1).sum(1),
        pixels=-discretised_log_prob(x, drawn.decoded, pixel_std).flatten(1).sum(1),
        latent_std=latent_std,
        pixel_std=pixel_std,
        latent_dims=drawn.z_0[0].numel(),
        pixel_dims=x[0].numel(),
    )


def discretised_log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log of the mass of a Gaussian in the bin of each 8-bit value, in nats; Ho et al. 2020, equation 13.

    The bins of 0 and 255 reach to infinity, so that the 256 masses add up to 1: no offset for dequantisation
    is needed.

    Args:
        x, mean: in 0..1, of any one shape.
        std: in levels of 255.
    """
    level, mean = (x.double() * LEVELS).round(), mean.double() * LEVELS
    low = torch.where(level == 0, -math.inf, (level - 0.5 - mean) / std)
    high = torch.where(level == LEVELS, math.inf, (level + 0.5 - mean) / std)
    mirrored = low + high > 0  # to the left of the mean, where logarithms keep their digits
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    mass: Tensor = upper + torch.log1p(-(lower - upper).exp())
    return mass
