"""DPM-Solver's singlestep methods: DPM fast, and DPM adaptive, which chooses the lengths of its steps.

Written by the contract of `ldm.diffusion.solvers`; Lu et al. 2022, "DPM-Solver" (arXiv 2206.00927).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.methods.multistep import log_integral
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import PURE_NOISE, Denoise, Step, anchored, level, move, slope, steps


def dpm_fast(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """DPM fast: steps in threes, whose inner levels are the grid's: first order, second, then third over all.

    With ``base`` the state where three begin, ``x' = base + sum_k c_k slope_k``: the polynomial in log sigma
    through the slopes at the levels so far, integrated from there (`log_integral`). DPM-Solver-3 of section
    3.2 and appendix B, whose thirds the exponential spacing gives. The step to sigma = 0, and one from pure
    noise, is of first order.
    """
    base, first = x, x
    nodes: list[float] = []
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        if len(nodes) in (0, 3) or not sigma_next or nodes[0] >= PURE_NOISE:
            base, first, nodes, slopes = anchored(x, d), d.x0, [], []
        nodes, slopes = [*nodes, sigma], [*slopes, slope(x, d, sigma)]
        x = move(base, first, sigma_next / nodes[0])
        for k in range(1, len(nodes)):
            x = x + log_integral(nodes, k, nodes[0], sigma_next) * (slopes[k] - slopes[0])
        yield Step(i, sigma_next, x, d.x0)


def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    accept_safety: float = 0.81,
) -> Iterator[Step]:
    """DPM adaptive: DPM-Solver-23, whose steps are as long as its error allows; three evaluations each.

    Appendix C, with k-diffusion's control of the length: ``h *= 1 + atan(1 / error^(1/3) - 1)``, the step
    made again where that is below `accept_safety`; the error is that of the second order, over ``max(atol,
    rtol |x|)``, in the picture that has most of it. Of the grid it takes the ends: sigma = 0 and pure noise
    are left and reached by a step of first order.
    """
    levels = sigmas.tolist()
    end, start = len(levels) - (2 if levels[-1] == 0 else 1), 0
    if levels[0] >= PURE_NOISE and end > 0:
        d = denoise(x, sigmas[0])
        x, start = move(anchored(x, d), d.x0, levels[1] / levels[0]), 1
        yield Step(0, levels[1], x, d.x0)
    sigma, before, h = levels[start], x, h_init
    while sigma > levels[end] * (1 + 1e-5):
        sigma_next = max(levels[end], sigma * math.exp(-h))
        sigma_next = levels[end] if sigma_next < levels[end] * (1 + 1e-5) else sigma_next
        x0, low, high = _embedded(denoise, x, sigma, sigma_next)
        error = _worst((low - high) / (rtol * torch.maximum(low.abs(), before.abs())).clamp(min=atol))
        factor = 1 + math.atan(1 / (error + 1e-8) ** (1 / 3) - 1) if math.isfinite(error) else 1.0
        h *= factor
        if factor >= accept_safety:
            x, before, sigma = high, low, sigma_next
            reached = sum(each >= sigma * (1 - 1e-6) for each in levels[1:])
            yield Step(max(reached - 1, 0), sigma, x, x0)
    if levels[-1] == 0:
        d = denoise(x, sigmas[end])
        yield Step(len(levels) - 2, 0.0, d.x0, d.x0)


def _worst(error: Tensor) -> float:
    """The largest root mean square of a picture's, of [B, C, H, W]."""
    return float(error.double().square().flatten(1).mean(1).sqrt().max())


def _embedded(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, x' of second order, x' of third) of one step: DPM-Solver-2 with r = 1/3, and DPM-Solver-3."""
    h = math.log(sigma / sigma_next)
    inner, last = sigma * math.exp(-h / 3), sigma * math.exp(-2 * h / 3)
    d = denoise(x, level(sigma))
    x = anchored(x, d)
    before = (x - d.x0) / sigma
    state = move(x, d.x0, inner / sigma)
    change = slope(state, denoise(state, level(inner)), inner) - before
    euler = move(x, d.x0, sigma_next / sigma)
    low = euler - sigma_next * 3 / 2 * math.expm1(h) * change
    state = move(x, d.x0, last / sigma) - 2 * last * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * change
    change = slope(state, denoise(state, level(last)), last) - before
    return d.x0, low, euler - sigma_next * 3 / 2 * (math.expm1(h) / h - 1) * change
