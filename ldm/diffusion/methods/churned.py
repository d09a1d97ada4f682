"""Euler, Heun and DPM2, that go along the slope at sigma, with noise added before a step; and restarts.

Written by the contract of `ldm.diffusion.solvers`. `s_churn`, `s_tmin`, `s_tmax` and `s_noise` are those of
Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2: at
levels from s_tmin to s_tmax, sigma is raised by the share ``min(s_churn / n, sqrt(2) - 1)``, with noise of
s_noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import (
    PURE_NOISE,
    Denoise,
    Step,
    add_noise,
    anchored,
    level,
    move,
    slope,
    split,
    steps,
)
from ldm.diffusion.spacings import spaced_sigmas


@dataclass(frozen=True)
class Churn:
    """How much noise is added before each of n steps."""

    n: int
    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def __call__(self, x: Tensor, sigma: float, noise: Noise) -> tuple[Tensor, float]:
        """The state at the raised level, and that level."""
        if self.s_churn <= 0 or not self.s_tmin <= sigma <= self.s_tmax or sigma >= PURE_NOISE:
            return x, sigma
        raised = sigma * (1 + min(self.s_churn / self.n, math.sqrt(2) - 1))
        return add_noise(x, self.s_noise * math.sqrt(raised**2 - sigma**2), noise, sigma, raised), raised


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Euler's method, ``x' = x + (sigma' - sigma) slope``; Karras et al. 2022, algorithm 2 to its line 7."""
    churn = Churn(len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
    for i, sigma, sigma_next in steps(sigmas):
        x, raised = churn(x, sigma, noise)
        d = denoise(x, level(raised))
        x = move(anchored(x, d), d.x0, sigma_next / raised)
        yield Step(i, sigma_next, x, d.x0)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Heun's method, two evaluations a step; Karras et al. 2022, algorithms 1 and 2.

    ``x' = x + (sigma' - sigma) (slope + slope') / 2``, ``slope = (x - x0) / sigma``; of first order where
    sigma' = 0, and from pure noise, where the slope has no trapezium.
    """
    churn = Churn(len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
    for i, sigma, sigma_next in steps(sigmas):
        x, raised = churn(x, sigma, noise)
        x, x0 = _heun_step(denoise, x, raised, sigma_next)
        yield Step(i, sigma_next, x, x0)


def _heun_step(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
    """(x', x0) of one step of Heun's."""
    d = denoise(x, level(sigma))
    x = anchored(x, d)
    before = (x - d.x0) / sigma
    x = move(x, d.x0, sigma_next / sigma)
    if sigma_next and sigma < PURE_NOISE:
        d = denoise(x, level(sigma_next))
        x = x + (sigma_next - sigma) / 2 * (slope(x, d, sigma_next) - before)
    return x, d.x0


def dpm2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 0.0,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM2 (diffusers' KDPM2): the midpoint rule in log sigma, two evaluations a step; eta > 0 is DPM2 a.

    ``x' = x + (down - sigma) slope_mid + up noise``, slope_mid the slope at ``sqrt(sigma down)``, where
    Euler's step leads; k-diffusion's ``sample_dpm_2``, after Lu et al. 2022, "DPM-Solver", algorithm 1. Of
    first order to 0 and from pure noise.
    """
    churn = Churn(len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
    for i, sigma, sigma_next in steps(sigmas):
        x, raised = churn(x, sigma, noise)
        d = denoise(x, level(raised))
        x = anchored(x, d)
        down, up = split(raised, sigma_next, eta)
        end = move(x, d.x0, down / raised)
        if down and sigma < PURE_NOISE:
            middle, before = math.sqrt(raised * down), (x - d.x0) / raised
            between = move(x, d.x0, middle / raised)
            d = denoise(between, level(middle))
            end = end + (down - raised) * (slope(between, d, middle) - before)
        x = add_noise(end, up, noise, raised, sigma_next)
        yield Step(i, sigma_next, x, d.x0)


def restart(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, s_noise: float = 1.0
) -> Iterator[Step]:
    """Restart: Heun's method, that goes back from sigma = 0.1 to 2 by adding noise, and down again.

    Xu et al. 2023, "Restart Sampling for Improving Generative Processes", algorithm 1, with AUTOMATIC1111's
    choice of levels (`restart_levels`): as many steps as the grid has, and only its ends.
    """
    levels = restart_levels(sigmas.tolist())
    for i, (sigma, sigma_next) in enumerate(levels):
        if i and sigma > levels[i - 1][1]:
            back = levels[i - 1][1]
            x = add_noise(x, s_noise * math.sqrt(sigma**2 - back**2), noise, back, sigma)
        x, x0 = _heun_step(denoise, x, sigma, sigma_next)
        yield Step(i, sigma_next, x, x0)


def restart_levels(sigmas: list[float]) -> list[tuple[float, float]]:
    """(sigma, sigma') of each step, as many as of the grid.

    From 20 steps on 9 of them, and from 36 on two quarters, go from 2 to 0.1 again; the others lie between
    the grid's ends, all in the spacing of Karras et al. 2022, equation 5. The grid itself stays where it is
    shorter, or does not reach so far. A step from pure noise stays as it is.
    """
    n = len(sigmas) - 1
    again, times = (n // 4, 2) if n >= 36 else (9, 1)
    first = sigmas[:1] if sigmas[0] > 1000 else []  # from there, all levels would be above the picture's
    start, low = sigmas[len(first)], sigmas[-2] if sigmas[-1] == 0 else sigmas[-1]
    if n < 20 or not (start > 2 and low < 0.1):
        return list(itertools.pairwise(sigmas))
    count = n - again * times - len(first) + (sigmas[-1] != 0)
    base = [*first, *spaced_sigmas("karras", count, start, low).tolist(), *([0.0] if sigmas[-1] == 0 else [])]
    bottom, top = (min(base[:-1], key=lambda each: abs(each - aim)) for aim in (0.1, 2.0))
    pairs = []
    for sigma, sigma_next in itertools.pairwise(base):
        pairs.append((sigma, sigma_next))
        if sigma_next == bottom:
            segment = [top, *spaced_sigmas("karras", again + 1, top, bottom).tolist()[1:-1], bottom]
            pairs += list(itertools.pairwise(segment)) * times
    return pairs
