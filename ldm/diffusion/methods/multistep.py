"""Solvers that draw a polynomial through the slopes of several steps: Adams-Bashforth's kind.

Written by the contract of `ldm.diffusion.solvers`. ``slope = (x - x0) / sigma`` is the noise estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import (
    PURE_NOISE,
    Denoise,
    Step,
    anchored,
    integral,
    lagrange,
    move,
    slope,
    steps,
)

# Adams-Bashforth of orders 1 to 4, newest slope first.
ADAMS = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def pndm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """PLMS: Adams-Bashforth of order 4 with fixed weights; Liu et al. 2022, "PNDM", equations 9, 11 and 12.

    ``x' = x + (sigma' - sigma) eps'``, ``eps'`` the weighted noise estimates. The first step is one of Heun's
    (diffusers' ``skip_prk_steps``), so that n > 1 steps take n + 1 evaluations; from pure noise, Euler's.
    """
    history: list[Tensor] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        eps = (x - d.x0) / sigma
        history = [eps, *history[:3]]
        x = move(x, d.x0, sigma_next / sigma)
        if i == 0 and len(sigmas) > 2 and sigma < PURE_NOISE:
            d = denoise(x, sigmas[i + 1])
            change = (slope(x, d, sigma_next) - eps) / 2
            x = x + (sigma_next - sigma) * change
        elif i > 0:
            x = _adams(x, history, sigma_next - sigma)
        yield Step(i, sigma_next, x, d.x0)


def ipndm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = 4) -> Iterator[Step]:
    """iPNDM: `pndm` that begins with steps of lower orders, one evaluation each, and ends in x0.

    Zhang and Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator", section 4.2.
    """
    history: list[Tensor] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        history = [(x - d.x0) / sigma, *history[: order - 1]]
        x = move(x, d.x0, sigma_next / sigma)
        x = _adams(x, history, sigma_next - sigma) if sigma_next else x
        yield Step(i, sigma_next, x, d.x0)


def _adams(x: Tensor, history: list[Tensor], length: float) -> Tensor:
    """From Euler's end of a step to Adams-Bashforth's; `history` has the slopes, newest first."""
    for weight, old in zip(ADAMS[len(history) - 1], history, strict=True):
        x = x + length * weight * (old - history[0])
    return x


def lms(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = 4, ends_in_x0: bool = False
) -> Iterator[Step]:
    """Linear multistep: the slopes' interpolating polynomial in sigma, integrated over the step.

    ``x' = x + sum_k c_k slope_k``, ``c_k`` the integral of the k-th Lagrange polynomial (two Gauss-Legendre
    nodes: exact up to order 4); Adams-Bashforth with unequal steps, as in k-diffusion's ``sample_lms``. With
    `ends_in_x0` the step to sigma = 0 is of first order, and it is iPNDM_v.
    """
    levels = sigmas.tolist()
    history: list[Tensor] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        history = [(x - d.x0) / sigma, *history[: order - 1]]
        x = move(x, d.x0, sigma_next / sigma)
        nodes = [levels[i - k] for k in range(len(history))]
        for k in range(1, len(history) if sigma_next or not ends_in_x0 else 1):
            x = x + _lagrange_integral(nodes, k, sigma, sigma_next) * (history[k] - history[0])
        yield Step(i, sigma_next, x, d.x0)


def _lagrange_integral(nodes: list[float], k: int, start: float, end: float) -> float:
    """Integral from `start` to `end` of the polynomial that is 1 at ``nodes[k]`` and 0 at the other nodes."""
    middle, half = (start + end) / 2, (end - start) / 2
    return half * sum(lagrange(nodes, k, middle + side * half / math.sqrt(3)) for side in (-1, 1))


def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = 2) -> Iterator[Step]:
    """DEIS in log rho: the slopes' interpolating polynomial in log sigma, integrated over the step in sigma.

    ``x' = x + sum_k c_k slope_k``, ``c_k`` as in `log_integral`; Zhang and Chen 2023, "Fast Sampling of
    Diffusion Models with Exponential Integrator", section 4. As in diffusers, below 15 steps the last but one
    is of second order at most; the step to sigma = 0 is of first.
    """
    levels, n = sigmas.tolist(), len(sigmas) - 1
    history: list[Tensor] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        history = [(x - d.x0) / sigma, *history[: order - 1]]
        x = move(x, d.x0, sigma_next / sigma)
        most = order if n >= 15 else min(order, n - i)
        nodes = levels[i::-1][: min(most, len(history)) if sigma_next else 1]
        for k in range(1, len(nodes)):
            x = x + log_integral(nodes, k, sigma, sigma_next) * (history[k] - history[0])
        yield Step(i, sigma_next, x, d.x0)


def log_integral(nodes: list[float], k: int, start: float, end: float) -> float:
    """Integral in sigma, from `start` to `end`, of the polynomial in log sigma that is 1 at ``nodes[k]`` and
    0 at the other nodes; all are above 0.
    """
    logs = [math.log(node) for node in nodes]
    return integral(lambda u: lagrange(logs, k, u) * math.exp(u), math.log(start), math.log(end))


def gradient_estimation(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, gamma: float = 2.0
) -> Iterator[Step]:
    """Gradient estimation: Euler along ``gamma slope + (1 - gamma) slope_before``.

    Permenter and Yuan 2024, "Interpreting and Improving Diffusion Models from an Optimization Perspective",
    algorithm 2. On even steps gamma = 1.5 is Adams-Bashforth of order 2. The step to sigma = 0 ends in x0.
    """
    before = x
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        eps = (x - d.x0) / sigma
        x = move(x, d.x0, sigma_next / sigma)
        if i > 0 and sigma_next:
            x = x + (sigma_next - sigma) * (gamma - 1) * (eps - before)
        before = eps
        yield Step(i, sigma_next, x, d.x0)
