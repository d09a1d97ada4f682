"""Solvers of diffusion's reverse SDE with more than one step's memory: SA-Solver and ER-SDE; and TCD's jumps.

Written by the contract of `ldm.diffusion.solvers`.
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
    Times,
    add_noise,
    anchored,
    integral,
    lagrange,
    move,
    steps,
)


def tcd(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 0.3,
    times: Times | None = None,
) -> Iterator[Step]:
    """Trajectory consistency: jump to a level below the next, add noise up to it; Zheng et al. 2024, "TCD".

    ``x' = x0 + (s / sigma) (x - x0) + sqrt(sigma'^2 - s^2) noise``, s the level of timestep ``(1 - eta) t'``
    rounded down; algorithm 4, whose gamma is eta. Without `times` ``s = (1 - eta) sigma'``.
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        below = (1 - eta) * sigma_next
        if times is not None and sigma_next:
            below = min(float(times.sigma(math.floor((1 - eta) * float(times.t(sigma_next))))), sigma_next)
        x = move(anchored(x, d), d.x0, below / sigma)
        x = add_noise(x, math.sqrt(sigma_next**2 - below**2), noise, sigma, sigma_next)
        yield Step(i, sigma_next, x, d.x0)


def er_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = 3, s_noise: float = 1.0
) -> Iterator[Step]:
    """ER-SDE: an extended reverse SDE, of which the noise that it adds is a function's, not a share.

    ``x' = x0 + r (x - x0) + (dt + s_1 f') D_1 + (dt^2 / 2 + s_2 f') D_2 + sqrt(sigma'^2 - r^2 sigma^2) z``
    with ``f(sigma) = sigma (exp(sigma^0.3) + 10)``, ``r = f' / f``, ``dt = sigma' - sigma``, ``s_1`` and
    ``s_2`` the integrals of ``1 / f`` and ``(u - sigma) / f`` from sigma' to sigma, and D x0's divided
    differences over the steps before, the second times 2; Cui et al. 2023, "Elucidating the Solution Space of
    Extended Reverse-Time SDE for Diffusion Models" (arXiv 2309.06169), algorithm 3 and its ER SDE 5. Their
    sums of 200 rectangles are integrals here.
    """
    levels = sigmas.tolist()
    x0s: list[Tensor] = []
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        x0s = [d.x0, *x0s[:1]]
        if sigma_next:
            log_next = _log_extent(sigma_next)
            ratio, change = math.exp(log_next - _log_extent(sigma)), sigma_next - sigma
            x = move(x, d.x0, ratio)
            if len(x0s) == 2 and order > 1:
                slopes = [(d.x0 - x0s[1]) / (sigma - levels[i - 1]), *slopes[:1]]
                x = x + (change + _share(sigma_next, sigma, log_next, 0)) * slopes[0]
                if len(slopes) == 2 and order > 2:
                    bend = (slopes[0] - slopes[1]) / ((sigma - levels[i - 2]) / 2)
                    x = x + (change**2 / 2 + _share(sigma_next, sigma, log_next, 1)) * bend
            up = s_noise * math.sqrt(max(0.0, sigma_next**2 - (ratio * sigma) ** 2))
            x = add_noise(x, up, noise, sigma, sigma_next)
        else:
            x = d.x0
        yield Step(i, sigma_next, x, d.x0)


def _log_extent(sigma: float) -> float:
    """Log of f; f itself has no number at pure noise."""
    return math.log(sigma) + float(sigma**0.3 + math.log1p(10 * math.exp(-(sigma**0.3))))


def _share(low: float, high: float, log_next: float, power: int) -> float:
    """``f'`` times the integral of ``(u - high)^power / f(u)`` from `low` to `high`, taken over log u."""

    def weight(log_u: float) -> float:
        u = math.exp(log_u)
        return float(math.exp(log_next - _log_extent(u)) * (u - high) ** power * u)

    return integral(weight, math.log(low), math.log(high))


def sa_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 1.0,
    predictor_order: int = 2,
    corrector_order: int = 2,
    times: Times | None = None,
) -> Iterator[Step]:
    """SA-Solver: stochastic Adams, a predictor and a corrector, one evaluation a step.

    With ``a = 1 + tau^2`` and ``h = log(sigma / sigma')``, ``x' = x0 + exp(-a h) (x - x0) + sum_k c_k (x0_k -
    x0) + sigma' sqrt(1 - exp(-2 tau^2 h)) noise``, ``c_k`` of `_adams_weight`; Xue et al. 2023, "SA-Solver"
    (arXiv 2309.05019), algorithm 1 and equations 14 and 17, with data prediction. tau is eta between 20 % and
    80 % of the training timesteps, as in diffusers, and 0 elsewhere; without `times` it is eta everywhere. Of
    lower order towards the end; to sigma = 0, and without corrector from pure noise, of first.
    """
    levels, n = sigmas.tolist(), len(sigmas) - 1
    x0s: list[Tensor] = []  # newest first
    old, fresh, share = x, None, 0.0
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        if i > 0 and levels[i - 1] < PURE_NOISE:
            nodes = levels[i::-1][:corrector_order]
            x = _adams(old, [d.x0, *x0s], nodes, levels[i - 1], sigma, share, at_end=True)
            x = x if fresh is None else x + fresh
        x0s = [d.x0, *x0s[: max(predictor_order, corrector_order) - 1]]
        old, share, fresh = anchored(x, d), eta**2 if _within(sigma, times) else 0.0, None
        nodes = levels[i::-1][: min(predictor_order, n - i) if sigma_next else 1]
        x = _adams(old, x0s, nodes, sigma, sigma_next, share)
        if share and sigma_next:
            up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** (2 * share))
            fresh = up * noise(x, sigma, sigma_next)
            x = x + fresh
        yield Step(i, sigma_next, x, d.x0)


def _within(sigma: float, times: Times | None) -> bool:
    """Whether a level is one of those at which SA-Solver adds noise."""
    if times is None:
        return True
    t, top = float(times.t(sigma)), float(times.t(PURE_NOISE)) + 1
    return 0.2 * top <= t <= 0.8 * top


def _adams(
    x: Tensor,
    x0s: list[Tensor],
    nodes: list[float],
    sigma: float,
    sigma_next: float,
    share: float,
    at_end: bool = False,
) -> Tensor:
    """The step from `sigma` without its noise; `nodes` are the levels of the first of `x0s`, newest first.

    With `at_end` the first of them is that of the step's end, and the second the one it begins with.
    """
    a, here = 1 + share, int(at_end)
    base = x0s[here] if here < len(nodes) else x0s[0]
    end = move(x, base, (sigma_next / sigma) ** a)
    for k in range(len(nodes)):
        if k != here and len(nodes) > 1:
            end = end + _adams_weight(nodes, k, sigma, sigma_next, a) * (x0s[k] - base)
    return end


def _adams_weight(nodes: list[float], k: int, sigma: float, sigma_next: float, a: float) -> float:
    """``a`` times the integral of ``exp(a (l - l'))`` and x0_k's Lagrange polynomial in ``l = -log sigma``.

    At order 2 the exponential's place is taken by its first term, as in diffusers: "used only for few steps".
    """
    h, logs = math.log(sigma / sigma_next), [-math.log(node) for node in nodes]
    if len(nodes) == 2:
        return a * h / 2 if k == 0 else a * h**2 / (2 * (logs[1] - logs[0]))
    start, end = -math.log(sigma), -math.log(sigma_next)
    return a * integral(lambda u: lagrange(logs, k, u) * math.exp(a * (u - end)), start, end)
