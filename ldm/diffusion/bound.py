"""The variational bound: ``-log p(x_0) <= prior + sum of steps + decoder``, in nats for each picture.

Ho et al. 2020, equation 5, written in sigma space for any falling list of noise levels. With the posterior's
own variance in every step it is Kingma et al. 2021, equation 13; with more levels it falls towards the
diffusion part of that paper's continuous bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.forward import Gaussian, sigma_posterior
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import Denoise, Variance, step_log_variance


@dataclass(frozen=True, eq=False)
class Term:
    """One term of the bound: from noise level `sigma` to `sigma_next`, nats for each picture, [B]."""

    name: str  # "prior", "step", "decoder"
    sigma: float
    sigma_next: float
    nats: Tensor


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """``nats / (dims ln 2)``."""
    return nats / (dims * math.log(2))


def bound(
    denoise: Denoise,
    x0: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    variance: Variance | None = None,
    decoder_variance: float | None = None,
) -> Iterator[Term]:
    """Every term of the bound on ``-log p(x0)``; their sum is one draw of it.

    - prior: ``KL(q(x | x_0) || N(0, 1 + sigma^2))`` at the first level: nothing where it is infinite.
    - step: ``KL(q(x' | x, x_0) || p(x' | x))``. p has the mean of the posterior about the network's guess of
      x_0, and the log variance of `step_log_variance`: what `ddpm` draws from.
    - decoder: ``-log N(x_0; guess, decoder_variance)`` at the last level.

    Args:
        denoise: as for a solver.
        x0: latents or pictures, [B, C, H, W].
        sigmas: falling noise levels, float64; a last 0 is left out.
        noise: one generator for each picture: a level's x is its own draw.
        variance: of the steps; by default what the network has learned, or else fixed_small.
        decoder_variance: of p(x_0 | x) at the last level; by default ``sigma^2 / (1 + sigma^2)``, that of x_0
            given x where x_0 is unit noise.
    """
    levels = sigmas[sigmas > 0].to(x0.device, torch.float64)
    dims = tuple(range(1, x0.ndim))
    first = levels[0]
    prior = Gaussian(x0.double(), (first**2).log()).kl(
        Gaussian(torch.zeros_like(x0, dtype=torch.float64), (1 + first**2).log())
    )
    yield Term("prior", math.inf, float(first), prior.sum(dims))
    for sigma, sigma_next in pairwise(levels):
        x = x0 + sigma.to(x0) * noise(x0, float(sigma), float(sigma_next))
        d = denoise(x, sigma)
        true = sigma_posterior(x0.double(), x.double(), sigma, sigma_next)
        mean = sigma_posterior(d.x0.double(), x.double(), sigma, sigma_next).mean
        guess = Gaussian(mean, step_log_variance(d, sigma, sigma_next, variance).double())
        yield Term("step", float(sigma), float(sigma_next), true.kl(guess).sum(dims))
    last = levels[-1]
    x = x0 + last.to(x0) * noise(x0, float(last), 0.0)
    if decoder_variance is None:
        decoder_variance = float(last**2 / (1 + last**2))
    log_variance = torch.tensor(math.log(decoder_variance), dtype=torch.float64)
    decoder = Gaussian(denoise(x, last).x0.double(), log_variance)
    yield Term("decoder", float(last), 0.0, -decoder.log_prob(x0.double()).sum(dims))
