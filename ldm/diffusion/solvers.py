"""Solvers: from noise to latents along a falling list of noise levels.

State lives in sigma space, ``x = x0 + sigma * noise``. A solver is a generator
``(denoise, x, sigmas, noise, *, ...) -> Iterator[Step]`` that keeps its history in locals: nothing is shared,
so one pipeline serves many threads, and anybody may write another one. This file is the contract, the pieces
that solvers share, and the one that most pictures are drawn by; `ldm/diffusion/methods/` holds the others.

Steps are written as ``x' = x0 + (sigma' / sigma) (x - x0) + ...``, never as ``x + (sigma' - sigma) slope``:
the first ends in exactly x0 at sigma' = 0, and loses nothing in fp32 when sigma is in the thousands.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.forward import sigma_log_variances
from ldm.diffusion.noise import Noise
from ldm.errors import UserError

# Zero terminal SNR makes the last sigma infinite. This stands for that: x / sigma is the noise to the last
# bit, and all is finite in fp32.
PURE_NOISE = 1e10

_X0 = torch.empty(0)  # stands for "the anchor is x0"


@dataclass(frozen=True, eq=False)
class Denoised:
    """A network's answer at one state.

    x0: the clean latents, [B, C, H, W]. anchor: solvers step along ``(x - anchor) / sigma``; it is x0 unless
    a guidance such as CFG++ says otherwise. log_variance: where a model has learned its variance, the next
    noise level (a scalar) to the log variance of ``p(x' | x)`` there, in sigma space, [B, C, H, W]: the
    variance of a step depends on where it goes.
    """

    x0: Tensor
    anchor: Tensor = _X0
    log_variance: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.anchor is _X0:
            object.__setattr__(self, "anchor", self.x0)


@dataclass(frozen=True, eq=False)
class Step:
    """The state `x` at noise level `sigma` after step `i` (from 0), and the latest guess `x0` at the end.

    i: the place in the grid. It never falls, and ends at the grid's last; a solver that chooses its own
    levels may tell of a place several times, or of none.
    """

    i: int
    sigma: float
    x: Tensor
    x0: Tensor

    @property
    def latents(self) -> Tensor:
        """The state at the network's scale, ``x / sqrt(sigma^2 + 1)``: what diffusers calls latents."""
        return self.x / math.hypot(self.sigma, 1)


Denoise = Callable[[Tensor, Tensor], Denoised]
Solver = Callable[..., Iterator[Step]]


class Times(Protocol):
    """Noise levels to timesteps and back: a `Grid`, for the few solvers that ask what the network is told."""

    def t(self, sigma: float) -> Tensor: ...

    def sigma(self, t: float) -> Tensor: ...


# diffusers' `variance_type`, one name for each meaning.
Variance = Literal["fixed_small", "fixed_large", "learned_range"]


def step_log_variance(d: Denoised, sigma: Tensor, sigma_next: Tensor, variance: Variance | None) -> Tensor:
    """The log variance of ``p(x' | x)`` in sigma space: a scalar where it is fixed, or [B, C, H, W].

    fixed_small and fixed_large are the logs of beta-tilde and beta (`sigma_log_variances`), learned_range is
    what the network says (`Denoised.log_variance`); None is the latter, or fixed_small where it says nothing.

    Raises:
        UserError: for learned_range where the network says nothing.
    """
    if d.log_variance is not None and variance in (None, "learned_range"):
        return d.log_variance(sigma_next)
    if variance == "learned_range":
        raise UserError(
            "variance learned_range needs a model that has learned it, and a guidance that asks for the "
            "branch cond: give fixed_small, which goes with all"
        )
    lower, upper = sigma_log_variances(sigma, sigma_next)
    return upper if variance == "fixed_large" else lower


def steps(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """(i, sigma, sigma_next) of each step."""
    levels = sigmas.tolist()
    yield from zip(range(len(levels)), levels, levels[1:], strict=False)


def level(sigma: float) -> Tensor:
    """A noise level that a solver has chosen itself, as a denoiser takes it."""
    return torch.tensor(sigma, dtype=torch.float64)


def anchored(x: Tensor, d: Denoised) -> Tensor:
    """The state with noise ``(x - anchor) / sigma`` about x0, so that every solver honours an anchor."""
    return x if d.anchor is d.x0 else x + (d.x0 - d.anchor)


def slope(x: Tensor, d: Denoised, sigma: float) -> Tensor:
    """``(x - anchor) / sigma``: dx / dsigma of the probability flow."""
    return (x - d.anchor) / sigma


def move(x: Tensor, x0: Tensor, ratio: float) -> Tensor:
    """Scale the noise of `x` about `x0` by ``ratio = sigma_next / sigma``."""
    return x0 + ratio * (x - x0) if ratio else x0


def split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step to `down`, then add `up` of fresh noise, ``down^2 + up^2 = sigma_next^2``.

    ``up = eta * sigma_next * sqrt(1 - (sigma_next / sigma)^2)``; Song et al. 2021, "DDIM", equation 16.
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up


def add_noise(x: Tensor, up: float, noise: Noise, sigma: float, sigma_next: float) -> Tensor:
    return x + up * noise(x, sigma, sigma_next) if up else x


def lagrange(nodes: Sequence[float], k: int, u: float) -> float:
    """At u, the polynomial that is 1 at ``nodes[k]`` and 0 at the other nodes."""
    others = [node for j, node in enumerate(nodes) if j != k]
    return math.prod((u - node) / (nodes[k] - node) for node in others)


_NODES, _WEIGHTS = (values.tolist() for values in np.polynomial.legendre.leggauss(24))


def integral(f: Callable[[float], float], start: float, end: float) -> float:
    """Of a smooth f from `start` to `end`, by 24 Gauss-Legendre nodes."""
    middle, half = (start + end) / 2, (end - start) / 2
    return half * sum(w * f(middle + half * u) for u, w in zip(_NODES, _WEIGHTS, strict=True))


def multistep_orders(
    n: int, to_zero: bool, lower_order_final: bool | None = None, euler_at_final: bool = False
) -> tuple[int, ...]:
    """The order of each of DPM++ 2M's steps on a grid of n, as diffusers' keys of these names ask.

    The last is of first order if it ends at 0, where log sigma is infinite, and by default below 15 steps.
    """
    low = to_zero or euler_at_final or (lower_order_final is not False and n < 15)
    return (1, *[2] * (n - 2), 1 if low else 2)[:n]


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 0.0, orders: Sequence[int] = ()
) -> Iterator[Step]:
    """DPM-Solver++(2M), and with eta > 0 its SDE form.

    With ``h = log(sigma / sigma')`` and ``D = x0 + h / (2 h_before) (x0 - x0_before)``:
    ``x' = D + exp(-h (1 + eta)) (x - D) + sigma' sqrt(1 - exp(-2 eta h)) noise``; Lu et al. 2022,
    "DPM-Solver++", algorithm 2 and, for the SDE, section 5. Without `orders`, those of `multistep_orders`.
    """
    orders = orders or multistep_orders(len(sigmas) - 1, bool(sigmas[-1] == 0))
    h_before, before = 0.0, x
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        ratio = sigma_next / sigma
        target, h = d.x0, -math.log(ratio) if ratio else math.inf
        if i > 0 and orders[i] == 2:
            target = d.x0 + h / (2 * h_before) * (d.x0 - before)
        x = move(anchored(x, d), target, ratio ** (1 + eta))
        if eta:
            x = add_noise(x, sigma_next * math.sqrt(1 - ratio ** (2 * eta)), noise, sigma, sigma_next)
        h_before, before = h, d.x0
        yield Step(i, sigma_next, x, d.x0)
