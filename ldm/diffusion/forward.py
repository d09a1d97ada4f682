"""The forward process: how a picture becomes noise, and what the way back is when the picture is known.

Two spaces say the same. In the variance-preserving space of DDPM, with ``a_t = alphas_cumprod[t]``,
``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``; in sigma space, where solvers live, ``x = x_0 + sigma noise``
with ``sigma^2 = (1 - a) / a``, and the first is the second times ``sqrt(a) = 1 / sqrt(1 + sigma^2)``. SNR is
``a / (1 - a) = 1 / sigma^2`` in both. Functions take tensors of any float dtype; ``a`` broadcasts against x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def snr(sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio ``1 / sigma^2``; Kingma et al. 2021, "Variational Diffusion Models", eq. 1."""
    return sigma**-2.0


def q_sample(x0: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """A draw of ``q(x_t | x_0)``: ``sqrt(a) x_0 + sqrt(1 - a) noise``; Ho et al. 2020, equation 4.

    Args:
        x0: pictures or latents, [B, C, H, W].
        noise: unit noise of the same shape.
        a: alphas_cumprod at t, a scalar or [B, 1, 1, 1].
    """
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def q_step(x: Tensor, noise: Tensor, beta: Tensor) -> Tensor:
    """A draw of ``q(x_t | x_{t-1})``: ``sqrt(1 - beta) x + sqrt(beta) noise``; Ho et al. 2020, equation 2."""
    return (1 - beta).sqrt() * x + beta.sqrt() * noise


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A diagonal Gaussian; `log_variance` broadcasts against `mean`."""

    mean: Tensor
    log_variance: Tensor

    def kl(self, other: Gaussian) -> Tensor:
        """``KL(self || other)`` in nats, element by element."""
        squared = (self.mean - other.mean) ** 2 * (-other.log_variance).exp()
        ratio = self.log_variance - other.log_variance
        return 0.5 * (squared + (ratio.expm1() - ratio))  # of near equals, in fp32 too

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats, element by element."""
        squared = (x - self.mean) ** 2 * (-self.log_variance).exp()
        return -0.5 * (squared + self.log_variance + math.log(2 * math.pi))


def posterior(x0: Tensor, x: Tensor, a_t: Tensor, a_s: Tensor) -> Gaussian:
    """``q(x_s | x_t, x_0)`` for s < t, not only s = t - 1; Ho et al. 2020, equations 6 and 7.

    With ``alpha = a_t / a_s`` and ``beta = 1 - alpha``: mean ``sqrt(a_s) beta / (1 - a_t) x_0 +
    sqrt(alpha) (1 - a_s) / (1 - a_t) x_t``, variance ``beta (1 - a_s) / (1 - a_t)``, which is beta-tilde.
    """
    alpha = a_t / a_s
    mean = a_s.sqrt() * (1 - alpha) / (1 - a_t) * x0 + alpha.sqrt() * (1 - a_s) / (1 - a_t) * x
    return Gaussian(mean, log_variances(a_t, a_s)[0])


def log_variances(a_t: Tensor, a_s: Tensor) -> tuple[Tensor, Tensor]:
    """The logs of beta-tilde and beta, between which the true variance of ``p(x_s | x_t)`` lies.

    ``beta = 1 - a_t / a_s`` is right where x_0 is unit noise, ``beta-tilde = beta (1 - a_s) / (1 - a_t)``
    where x_0 is one point (Ho et al. 2020, section 3.2). The first is at least 1e-20, as in diffusers: it is
    0 at the step to x_0.
    """
    beta = 1 - a_t / a_s
    lower = (beta * (1 - a_s) / (1 - a_t)).clamp(min=1e-20)
    return lower.log(), beta.log()


def interpolated_log_variance(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """A learned log variance: ``u log(beta) + (1 - u) log(beta-tilde)``, ``u = (v + 1) / 2``.

    Nichol and Dhariwal 2021, "Improved DDPM", equation 15; `v` is what a network with doubled output
    channels gives, about -1..1 (diffusers' ``variance_type: learned_range``). `lower` and `upper` are of
    `log_variances`, or of `sigma_log_variances` for the log variance in sigma space.
    """
    u = (v + 1) / 2
    return u * upper + (1 - u) * lower


# --- in sigma space --------------------------------------------------------------------------------------


def sigma_log_variances(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """`log_variances` in sigma space: those plus ``log(1 + sigma'^2)``. Scalars or tables in float64.

    The first, of beta-tilde, is that of `sigma_posterior`; from pure noise the second is the variance of x'.
    """
    a_t, a_s = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    lower, upper = log_variances(a_t, a_s)
    scale = torch.log1p(sigma_next**2)
    return lower + scale, upper + scale


def sigma_posterior(x0: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Gaussian:
    """`posterior` in sigma space: mean ``x_0 + (sigma'^2 / sigma^2) (x - x_0)``, variance
    ``sigma'^2 (sigma^2 - sigma'^2) / sigma^2``.

    Its KL from the same Gaussian about a guess of x_0 is ``(SNR(sigma') - SNR(sigma)) / 2 |x_0 - guess|^2``
    (Kingma et al. 2021, equation 13).
    """
    ratio = (sigma_next / sigma) ** 2
    variance = sigma_next**2 * (1 - ratio)
    return Gaussian(x0 + ratio * (x - x0), variance.clamp(min=torch.finfo(variance.dtype).tiny).log())


def score(x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The gradient of ``log p_sigma(x)``, where x0 is the mean of x_0 given x: ``(x0 - x) / sigma^2``.

    Tweedie's formula (Efron 2011); with an eps-prediction it is ``-eps / sigma``. In the variance-preserving
    space multiply by ``sqrt(1 + sigma^2)``: the density there is that of ``x / sqrt(1 + sigma^2)``. That
    denoising learns it is Vincent 2011, "A Connection Between Score Matching and Denoising Autoencoders".
    """
    return (x0 - x) / sigma**2
