"""The likelihood of a picture by the probability-flow ODE.

In ``u = log sigma`` the flow is ``dx/du = x - x0(x, sigma)``, and along it ``d log p / du = -div(x - x0)``.
From the picture at the lowest level to noise at the highest, where the density is known. Song et al. 2021,
"Score-Based Generative Modeling through SDEs", section 4.3 and appendix D.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.diffusion.solvers import Denoise
from ldm.errors import UserError

Trace = Literal["exact", "rademacher", "gaussian"]

MAX_EXACT = 4096  # dimensions: each costs a gradient in every evaluation
MAX_EVALUATIONS = 3000  # a network in fp32 has no tolerance that is met with more


@dataclass(frozen=True)
class Likelihood:
    """log p(x) of one picture in nats: the mean of its estimates, one for each random vector.

    An exact one has one estimate without an error.
    """

    estimates: tuple[float, ...]
    evaluations: int  # calls of the network
    dims: int
    exact: bool = False

    @property
    def nats(self) -> float:
        return float(np.mean(self.estimates))

    @property
    def std_error(self) -> float:
        """Of `nats`, in nats, from the estimates' spread: 0 if exact, infinite for one estimate."""
        return 0.0 if self.exact else _std_error(self.estimates)

    @property
    def bits_per_dim(self) -> float:
        """``-log p / (dims ln 2)``: lower is likelier."""
        return -self.nats / (self.dims * math.log(2))

    def gain_over(self, other: Likelihood) -> tuple[float, float]:
        """How many nats likelier than `other`, and the standard error of that: estimates made with the same
        random vectors err alike, so their difference errs less than either."""
        gains = np.subtract(self.estimates, other.estimates)
        return float(gains.mean()), 0.0 if self.exact and other.exact else _std_error(gains)


def _std_error(values: Sequence[float] | NDArray[np.float64]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    trace: Trace = "rademacher",
    probes: int = 1,
    seed: int = 0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Likelihood:
    """log p of the state `x` at `sigma_min`, by an adaptive Runge-Kutta 4(5) of scipy.

    Args:
        denoise: differentiable in x; see `ldm.pipeline.networks`.
        x: one picture at noise level sigma_min, [1, C, H, W].
        sigma_max: where the density is taken for ``N(0, 1 + sigma_max^2)``: unit variance and the noise.
        trace: of the Jacobian: exact (as many network gradients as dimensions), or Hutchinson's estimate
            ``v^T J v`` with Rademacher or Gaussian v (Hutchinson 1989), the same v along the whole path.
        probes: how many v; the standard error comes from their spread, and is infinite for one.

    Raises:
        UserError: for a picture with NaN, for one too large for the exact trace, and where the solver misses
            its tolerance, with how far it came.
    """
    if len(x) != 1 or not bool(x.isfinite().all()):
        raise UserError("a likelihood is of one picture of finite numbers")
    dims, shape = x.numel(), x.shape
    if trace == "exact" and dims > MAX_EXACT:
        raise UserError(
            f"the exact trace of {dims} dimensions needs as many gradients a step, and {MAX_EXACT} are the "
            "most: take rademacher or gaussian"
        )
    vectors = _probes(trace, probes, x, seed)
    field = _field(denoise, vectors, shape, x)
    start = np.concatenate(
        [x.double().cpu().numpy().ravel(), np.zeros(len(vectors) if trace != "exact" else 1)]
    )
    end, evaluations = _integrate(field, start, math.log(sigma_min), math.log(sigma_max), rtol, atol)
    prior_variance = 1 + sigma_max**2
    prior = -0.5 * (end[:dims] @ end[:dims] / prior_variance + dims * math.log(2 * math.pi * prior_variance))
    return Likelihood(tuple((prior + end[dims:]).tolist()), evaluations, dims, trace == "exact")


def _probes(trace: Trace, count: int, x: Tensor, seed: int) -> Tensor:
    """[K, C, H, W]: the unit vectors for the exact trace."""
    if trace == "exact":
        return torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn((count, *x.shape[1:]), generator=generator)
    return (drawn.sign() if trace == "rademacher" else drawn).to(x)


def _field(denoise: Denoise, vectors: Tensor, shape: torch.Size, like: Tensor) -> Callable[[float, Any], Any]:
    """The right-hand side for scipy: the flow, and ``v^T J v`` of each probe, their sum if exact."""
    exact = len(vectors) == like.numel() and bool((vectors.flatten(1).sum(1) == 1).all())

    def field(u: float, state: Any) -> Any:
        values = torch.from_numpy(state[: like.numel()]).reshape(shape).to(like)
        sigma = torch.tensor(math.exp(u), dtype=torch.float64)
        with torch.enable_grad():
            x = values.detach().requires_grad_()
            flow = x - denoise(x, sigma).x0
            products = [
                (torch.autograd.grad(flow, x, v[None], retain_graph=True)[0] * v).sum() for v in vectors
            ]
        traces = torch.stack(products).double()
        traces = traces.sum()[None] if exact else traces
        return np.concatenate([flow.detach().double().cpu().numpy().ravel(), traces.cpu().numpy()])

    return field


def _integrate(
    field: Callable[[float, Any], Any], start: Any, low: float, high: float, rtol: float, atol: float
) -> tuple[Any, int]:
    from scipy.integrate import solve_ivp

    calls = 0

    def counted(u: float, state: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > MAX_EVALUATIONS:
            raise _missed(u, high, f"after {MAX_EVALUATIONS} evaluations", rtol)
        return field(u, state)

    found = solve_ivp(counted, (low, high), start, method="RK45", rtol=rtol, atol=atol)
    if not found.success:
        raise _missed(found.t[-1], high, f"({found.message})", rtol)
    return found.y[:, -1], calls


def _missed(u: float, high: float, why: str, rtol: float) -> UserError:
    return UserError(
        f"the likelihood's solver stopped at noise level {math.exp(u):.4g} of {math.exp(high):.4g} {why}: "
        f"give a larger tolerance than {rtol:g}"
    )
