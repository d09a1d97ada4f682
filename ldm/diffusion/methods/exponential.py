"""DPM-Solver++, UniPC and their kin: the clean picture's polynomial in log sigma, integrated with its weight.

Written by the contract of `ldm.diffusion.solvers`. Each step has an order, and the grid may say which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
    multistep_orders,
    split,
    steps,
)


def singlestep_orders(
    n: int, to_zero: bool, lower_order_final: bool | None = None, euler_at_final: bool = False
) -> tuple[int, ...]:
    """As `multistep_orders`, of DPM++ 2S: pairs of a first step and a second over both."""
    low = to_zero or bool(lower_order_final)
    return (*((1, 2) * n)[: n - 1], 1 if low or n % 2 else 2)


def unipc_orders(
    n: int, to_zero: bool, lower_order_final: bool | None = None, euler_at_final: bool = False
) -> tuple[int, ...]:
    """As `multistep_orders`, of UniPC: by default the last is of first order on every grid."""
    return (1, *[2] * (n - 2), 1 if to_zero or lower_order_final is not False else 2)[:n]


def third_orders(
    n: int, to_zero: bool, lower_order_final: bool | None = None, euler_at_final: bool = False
) -> tuple[int, ...]:
    """As `multistep_orders`, of DPM++ 3M: below 15 steps the last but one is of second order too."""
    *_, last = multistep_orders(n, to_zero, lower_order_final, euler_at_final)
    orders = [1, 2, *[3] * n][:n]
    if n > 1 and n < 15 and lower_order_final is not False:
        orders[-2] = min(orders[-2], 2)
    return (*orders[:-1], 1 if last == 1 else orders[-1])


def dpmpp_2s(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, orders: Sequence[int] = ()
) -> Iterator[Step]:
    """DPM-Solver++(2S), whose midpoint is a level of the grid; Lu et al. 2022, "DPM-Solver++", algorithm 1.

    Steps go in pairs: first order to the next level, an evaluation there, then second order over both. With
    ``h`` the log-sigma length of the pair and ``h_1`` of its first half, ``D = x0 + h / (2 h_1) (x0_1 - x0)``
    and ``x'' = D + (sigma'' / sigma) (x - D)``. Without `orders`, those of `singlestep_orders`.
    """
    orders = orders or singlestep_orders(len(sigmas) - 1, bool(sigmas[-1] == 0))
    base, first, start = x, x, 0.0
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        if i > 0 and orders[i] == 2:
            ratio = sigma_next / start
            target = first + math.log(ratio) / (2 * math.log(sigma / start)) * (d.x0 - first)
            x = move(base, target, ratio)
        else:  # a run that begins within a pair begins with a step of its own
            base, first, start = anchored(x, d), d.x0, sigma
            x = move(base, first, sigma_next / sigma)
        yield Step(i, sigma_next, x, d.x0)


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++ (SDE): two ancestral steps from sigma, the second along the x0 found at the first's end.

    The first ends at ``sqrt(sigma sigma')``. Lu et al. 2022, "DPM-Solver++", algorithm 1 with r = 1/2, with
    the ancestral noise of k-diffusion's ``sample_dpmpp_sde``. Of first order to 0 and from pure noise.
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        if sigma_next and sigma < PURE_NOISE:
            middle = math.sqrt(sigma * sigma_next)
            down, up = split(sigma, middle, eta)
            between = add_noise(move(x, d.x0, down / sigma), up, noise, sigma, middle)
            d = denoise(between, level(middle))
        down, up = split(sigma, sigma_next, eta)
        x = add_noise(move(x, d.x0, down / sigma), up, noise, sigma, sigma_next)
        yield Step(i, sigma_next, x, d.x0)


def unipc(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, orders: Sequence[int] = ()
) -> Iterator[Step]:
    """UniPC of order 2 with B(h) = exp(-h) - 1 ("bh2"), x0 prediction; Zhao et al. 2023, algorithms 5 to 8.

    Each evaluation first corrects the state that it was made at (UniC), then predicts the next one (UniP,
    which at order 2 is DPM++ 2M). Without `orders`, those of `unipc_orders`.
    """
    orders = orders or unipc_orders(len(sigmas) - 1, bool(sigmas[-1] == 0))
    levels, old = sigmas.tolist(), x
    x0s: list[Tensor] = []  # newest first: as many as the last prediction used
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        if i > 0:
            x = _unic(old, [d.x0, *x0s], levels[i::-1])
        old = anchored(x, d)
        target, used = d.x0, [d.x0]
        if i > 0 and orders[i] == 2:
            h_before, h = math.log(levels[i - 1] / sigma), math.log(sigma / sigma_next)
            target, used = d.x0 + h / (2 * h_before) * (d.x0 - x0s[0]), [d.x0, x0s[0]]
        x, x0s = move(old, target, sigma_next / sigma), used
        yield Step(i, sigma_next, x, d.x0)


def _unic(x: Tensor, x0s: list[Tensor], levels: list[float]) -> Tensor:
    """UniC: the step from `x` again, now that x0 at its end is known.

    `x0s` and `levels` run backwards from the step's end; two of them make order 1, three order 2.
    """
    new, here, *before = x0s
    ratio = levels[0] / levels[1]
    target = here + (new - here) / 2
    if before:
        h = -math.log(ratio)
        phi_1 = math.expm1(-h)
        phi_2 = -phi_1 / h - 1
        phi_3 = -phi_2 / h - 1 / 2
        b_1, b_2, r = phi_2 / phi_1, 2 * phi_3 / phi_1, -math.log(levels[2] / levels[1]) / h
        rho = (b_2 - r * b_1) / (1 - r)
        target = here + (b_1 - rho) / r * (before[0] - here) + rho * (new - here)
    return move(x, target, ratio)


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """DPM++ 2S a: the singlestep DPM-Solver++ down to a lower level, then fresh noise.

    ``x' = x0_mid + (down / sigma) (x - x0_mid) + up noise``, x0_mid as found at ``sqrt(sigma down)``; Lu et
    al. 2022, "DPM-Solver++", algorithm 1 with r = 1/2, as in k-diffusion's ``sample_dpmpp_2s_ancestral``. Of
    first order to 0 and from pure noise.
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        down, up = split(sigma, sigma_next, eta)
        if down and sigma < PURE_NOISE:
            middle = math.sqrt(sigma * down)
            d = denoise(move(anchored(x, d), d.x0, middle / sigma), level(middle))
        x = add_noise(move(anchored(x, d), d.x0, down / sigma), up, noise, sigma, sigma_next)
        yield Step(i, sigma_next, x, d.x0)


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 0.0,
    order: int = 3,
    midpoint: bool = False,
    orders: Sequence[int] = (),
) -> Iterator[Step]:
    """DPM-Solver++(3M), with eta > 0 its SDE form, and at order 2 DPM++ 2M (SDE) Heun.

    ``x' = x0 + exp(-a h) (x - x0) + increment + sigma' sqrt(1 - exp(-2 eta h)) noise``, ``a = 1 + eta``,
    ``h = log(sigma / sigma')``, the increment as in `_increment`; Lu et al. 2022, "DPM-Solver++", section 4,
    and k-diffusion's ``sample_dpmpp_3m_sde``. With `midpoint` steps of order 2 are those of `dpmpp_2m`, as in
    diffusers. A step to sigma = 0 is of first order.
    """
    x0s: list[Tensor] = []
    lengths: list[float] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        ratio = sigma_next / sigma
        h = -math.log(ratio) if ratio else math.inf
        x0s = [d.x0, *x0s[:2]]
        x = move(anchored(x, d), d.x0, ratio ** (1 + eta))
        if sigma_next:
            most = min(orders[i] if orders else order, order, len(x0s))
            x = x + _increment(x0s[:most], h, lengths, (1 + eta) * h, midpoint)
            x = add_noise(x, sigma_next * math.sqrt(1 - ratio ** (2 * eta)), noise, sigma, sigma_next)
        lengths = [h, *lengths[:1]]
        yield Step(i, sigma_next, x, d.x0)


def _increment(
    x0s: list[Tensor], h: float, before: list[float], weight: float, midpoint: bool = False
) -> Tensor | float:
    """What x0's change adds to a step of length h in log sigma, of order ``len(x0s)``; newest first.

    ``phi_2 d_1 - phi_3 d_2`` with the differences d over h, ``phi_2 = 1 - (1 - exp(-w)) / w`` and ``phi_3 =
    phi_2 / w - 1 / 2`` at the weight ``w``; `midpoint` has ``(1 - exp(-w)) / 2`` for order 2. `before` are
    the lengths of the steps before.
    """
    if len(x0s) == 1:
        return 0.0
    new, old, *older = x0s
    first = (h / before[0]) * (new - old)
    phi_2 = math.expm1(-weight) / weight + 1
    if not older:
        return (-math.expm1(-weight) / 2 if midpoint else phi_2) * first
    r, s = before[0] / h, before[1] / h
    bend = (first - (old - older[0]) / s) / (r + s)
    return phi_2 * (first + r * bend) - (phi_2 / weight - 1 / 2) * bend


def res_multistep(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 0.0
) -> Iterator[Step]:
    """RES multistep of order 2: an exponential integrator, with eta > 0 down to a lower level (ancestral).

    ``x' = x0 + (down / sigma) (x - x0) + phi_2 (h / h_before) (x0 - x0_before) + up noise`` with ``h =
    log(sigma / down)``; Zhang et al. 2023, "Improved Order Analysis and Design of Exponential Integrator for
    Diffusion Models Sampling" (arXiv 2308.02157), as in ComfyUI. A step to sigma = 0 is of first order.
    """
    x0s: list[Tensor] = []
    lengths: list[float] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        down, up = split(sigma, sigma_next, eta)
        h = math.log(sigma / down) if down else math.inf
        x0s = [d.x0, *x0s[:1]]
        x = move(anchored(x, d), d.x0, down / sigma)
        if down:
            x = add_noise(x + _increment(x0s, h, lengths, h), up, noise, sigma, sigma_next)
        lengths = [h]
        yield Step(i, sigma_next, x, d.x0)
