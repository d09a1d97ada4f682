"""Solvers that go back to noise at every step: ancestral sampling, DDPM, predictor-corrector, consistency.

Written as those of `ldm.diffusion.solvers`, by its contract and with its pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import (
    Denoise,
    Denoised,
    Step,
    Variance,
    add_noise,
    anchored,
    move,
    slope,
    split,
    step_log_variance,
    steps,
)


def ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """Euler (eta 0), DDIM(eta), Euler ancestral and DDPM (eta 1): one method under four names.

    ``x' = x0 + (down / sigma) (x - x0) + up * noise``; Song et al. 2021, "DDIM", equations 12 and 16, which
    in sigma space is the Euler step of Karras et al. 2022, equation 3, and at eta 1 the posterior of Ho et
    al. 2020, equation 7 (``fixed_small``).
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        down, up = split(sigma, sigma_next, eta)
        x = move(anchored(x, d), d.x0, down / sigma)
        x = add_noise(x, up, noise, sigma, sigma_next)
        yield Step(i, sigma_next, x, d.x0)


def ddpm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, variance: Variance | None = None
) -> Iterator[Step]:
    """DDPM on any grid: the posterior's mean about x0, and noise of one of its variances.

    ``x' = x0 + (sigma' / sigma)^2 (x - x0) + exp(log_variance / 2) noise``; Ho et al. 2020, algorithm 2 and
    section 3.2, with Nichol and Dhariwal 2021, "Improved DDPM", section 3.1, for a learned variance and
    section 4 for fewer steps. `variance` as in `step_log_variance`. The step to sigma = 0 ends at x0, without
    noise, as in that algorithm, whatever the variance (diffusers does so at timestep 0 only).
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        down, up = split(sigma, sigma_next, 1.0)
        x = move(anchored(x, d), d.x0, down / sigma)
        if d.log_variance is None and variance in (None, "fixed_small"):
            x = add_noise(x, up, noise, sigma, sigma_next)  # the bits of `ancestral`
        elif sigma_next:
            log_variance = step_log_variance(d, sigmas[i], sigmas[i + 1], variance)
            x = x + (log_variance / 2).exp().to(x) * noise(x, sigma, sigma_next)
        yield Step(i, sigma_next, x, d.x0)


def pc(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, snr: float = 0.16, correct_steps: int = 1
) -> Iterator[Step]:
    """Predictor-corrector: an ancestral step to the next level, then Langevin steps there.

    Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", algorithms
    2 and 4 (3 and 5 in the variance-preserving space). The predictor is its ancestral sampling, equation 47,
    which is finite from pure noise. `snr` and `correct_steps` are r and M there; sigma = 0 has no corrector.
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        down, up = split(sigma, sigma_next, 1.0)
        x = move(anchored(x, d), d.x0, down / sigma)
        x = add_noise(x, up, noise, sigma, sigma_next)
        for _ in range(correct_steps if sigma_next else 0):
            d = denoise(x, sigmas[i + 1])
            x = _langevin(x, d, sigma_next, noise(x, sigma_next, sigma_next), snr)
        yield Step(i, sigma_next, x, d.x0)


def _langevin(x: Tensor, d: Denoised, sigma: float, z: Tensor, snr: float) -> Tensor:
    """``x' = x + e score + sqrt(2 e) z`` with ``e = 2 (snr |z| / |score|)^2``, norms and e of each picture.

    Written with the noise estimate ``-sigma score``, whose norm is about that of z. Where it is next to
    nothing the step is as long as adds no more noise than the level has.
    """
    eps = slope(x, d, sigma)
    z_norm, eps_norm = (each.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for each in (z, eps))
    share = torch.where(2 * snr * z_norm < eps_norm, snr * z_norm / eps_norm, 0.5)
    return x - 2 * share**2 * sigma * eps + 2 * share * sigma * z


def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """Latent consistency: jump to x0, add the next level's noise; Luo et al. 2023, algorithm 3.

    ``x' = x0 + sigma' * noise``. The boundary condition ``c_skip x + c_out x0`` of its equation 9 is left
    out: at the timesteps an LCM is drawn with c_skip is below 1e-5, and without it the last state is x0.
    """
    for i, sigma, sigma_next in steps(sigmas):
        d = denoise(x, sigmas[i])
        x = add_noise(d.x0, sigma_next, noise, sigma, sigma_next)
        yield Step(i, sigma_next, x, d.x0)
