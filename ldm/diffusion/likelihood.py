"""The likelihood of a picture by the probability-flow ODE.

In ``u = log sigma`` the flow is ``dx/du = x - x0(x, sigma)``, and along it ``d log p / du = -div(x - x0)``.
From the picture at the lowest level to noise at the highest, where the density is known. Song et al. 2021,
"Score-Based Generative Modeling through SDEs", section 4.3 and appendix D.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.solvers import Denoise
from ldm.errors import UserError

Trace = Literal["exact", "rademacher", "gaussian"]


@dataclass(frozen=True)
class Likelihood:
    """log p(x) of one picture in nats; `std_error` of the trace's estimate; calls of the network."""

    nats: float
    std_error: float
    evaluations: int
    dims: int

    @property
    def bits_per_dim(self) -> float:
        """``-log p / (dims ln 2)``: lower is likelier."""
        return -self.nats / (self.dims * math.log(2))


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
        UserError: for a picture with NaN, and where the solver misses its tolerance, with how far it came.
    """
    if len(x) != 1 or not bool(x.isfinite().all()):
        raise UserError("a likelihood is of one picture of finite numbers")
    dims, shape = x.numel(), x.shape
    vectors = _probes(trace, probes, x, seed)
    field = _field(denoise, vectors, shape, x)
    start = np.concatenate(
        [x.double().cpu().numpy().ravel(), np.zeros(len(vectors) if trace != "exact" else 1)]
    )
    end, evaluations = _integrate(field, start, math.log(sigma_min), math.log(sigma_max), rtol, atol)
    prior_variance = 1 + sigma_max**2
    prior = -0.5 * (end[:dims] @ end[:dims] / prior_variance + dims * math.log(2 * math.pi * prior_variance))
    totals = prior + end[dims:]
    if trace == "exact":
        error = 0.0
    else:
        error = float(np.std(totals, ddof=1) / math.sqrt(probes)) if probes > 1 else math.inf
    return Likelihood(float(totals.mean()), error, evaluations, dims)


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

    found = solve_ivp(field, (low, high), start, method="RK45", rtol=rtol, atol=atol)
    if not found.success:
        raise UserError(
            f"the likelihood's solver stopped at noise level {math.exp(found.t[-1]):.4g} of "
            f"{math.exp(high):.4g} ({found.message}): give a larger tolerance"
        )
    return found.y[:, -1], int(found.nfev)
