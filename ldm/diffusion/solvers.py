"""Solvers: from noise to latents along a falling list of noise levels.

State lives in sigma space, ``x = x0 + sigma * noise``. A solver is a generator
``(denoise, x, sigmas, noise, *, ...) -> Iterator[Step]`` that keeps its history in locals: nothing is shared,
so one pipeline serves many threads, and anybody may write another one.

Steps are written as ``x' = x0 + (sigma' / sigma) (x - x0) + ...``, never as ``x + (sigma' - sigma) slope``:
the first ends in exactly x0 at sigma' = 0, and loses nothing in fp32 when sigma is in the thousands.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
    """The state `x` at noise level `sigma` after step `i` (from 0), and the latest guess `x0` at the end."""

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


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """Heun's method, two evaluations a step; Karras et al. 2022, algorithm 1.

    ``x' = x + (sigma' - sigma) (slope + slope') / 2``, ``slope = (x - x0) / sigma``; of first order where
    sigma' = 0, and from pure noise, where the slope has no trapezium.
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        before = (x - d.x0) / sigma
        x = move(x, d.x0, sigma_next / sigma)
        if sigma_next and sigma < PURE_NOISE:
            d = denoise(x, sigmas[i + 1])
            x = x + (sigma_next - sigma) / 2 * (slope(x, d, sigma_next) - before)
        yield Step(i, sigma_next, x, d.x0)


def pndm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """PLMS: Adams-Bashforth of order 4 with fixed weights; Liu et al. 2022, "PNDM", equations 9, 11 and 12.

    ``x' = x + (sigma' - sigma) eps'``, ``eps'`` the weighted noise estimates. The first step is one of Heun's
    (diffusers' ``skip_prk_steps``), so that n > 1 steps take n + 1 evaluations; from pure noise, Euler's.
    """
    weights = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
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
            for weight, old in zip(weights[len(history) - 1], history, strict=True):
                x = x + (sigma_next - sigma) * weight * (old - eps)
        yield Step(i, sigma_next, x, d.x0)


def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep: the slopes' interpolating polynomial in sigma, integrated over the step.

    ``x' = x + sum_k c_k slope_k``, ``c_k`` the integral of the k-th Lagrange polynomial (two Gauss-Legendre
    nodes: exact up to order 4); Adams-Bashforth with unequal steps, as in k-diffusion's ``sample_lms``.
    """
    levels = sigmas.tolist()
    history: list[Tensor] = []
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = anchored(x, d)
        history = [(x - d.x0) / sigma, *history[: order - 1]]
        x = move(x, d.x0, sigma_next / sigma)
        nodes = [levels[i - k] for k in range(len(history))]
        for k in range(1, len(history)):
            x = x + _lagrange_integral(nodes, k, sigma, sigma_next) * (history[k] - history[0])
        yield Step(i, sigma_next, x, d.x0)


def _lagrange_integral(nodes: list[float], k: int, start: float, end: float) -> float:
    """Integral from `start` to `end` of the polynomial that is 1 at ``nodes[k]`` and 0 at the other nodes."""

    def polynomial(sigma: float) -> float:
        others = [node for j, node in enumerate(nodes) if j != k]
        return math.prod((sigma - node) / (nodes[k] - node) for node in others)

    middle, half = (start + end) / 2, (end - start) / 2
    return half * sum(polynomial(middle + side * half / math.sqrt(3)) for side in (-1, 1))


# --- solvers of DPM-Solver++'s kind: each step has an order, and the grid may say which ---------------------


def multistep_orders(
    n: int, to_zero: bool, lower_order_final: bool | None = None, euler_at_final: bool = False
) -> tuple[int, ...]:
    """The order of each of DPM++ 2M's steps on a grid of n, as diffusers' keys of these names ask.

    The last is of first order if it ends at 0, where log sigma is infinite, and by default below 15 steps.
    """
    low = to_zero or euler_at_final or (lower_order_final is not False and n < 15)
    return (1, *[2] * (n - 2), 1 if low else 2)[:n]


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
            d = denoise(between, torch.tensor(middle, dtype=torch.float64))
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
