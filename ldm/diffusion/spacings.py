"""Spacings: the timesteps, or the noise levels, that an n-step run visits; `Schedule.grid` makes its grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Those that are defined on noise levels, and all.
SIGMA_SPACINGS = (
    "karras", "exponential", "beta", "polyexponential", "lu_lambdas", "kl_optimal", "linear_quadratic",
)  # fmt: skip
SPACINGS = (
    "leading", "trailing", "linspace", *SIGMA_SPACINGS, "ays", "sgm_uniform", "simple", "lcm", "ddim_uniform",
    "beta_timesteps", "gits",
)  # fmt: skip
RHO = {"karras": 7.0, "polyexponential": 1.0}  # of the spacings that have one, where nobody says another

# Sabour et al. 2024, "Align Your Steps": timesteps of ten steps for Stable Diffusion 1.5 and XL, T = 1000.
AYS = {
    "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "xl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}

# Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling", "GITS", as published for
# Stable Diffusion 1.5 with the coefficient 1.2: of 2 to 20 steps, in hundredths of the training timesteps.
GITS = (
    (100, 29, 0),
    (100, 49, 18, 0),
    (100, 61, 33, 11, 0),
    (100, 66, 42, 21, 6, 0),
    (100, 83, 57, 34, 15, 3, 0),
    (100, 83, 62, 42, 23, 8, 1, 0),
    (100, 83, 62, 45, 29, 15, 6, 1, 0),
    (100, 83, 66, 50, 34, 21, 11, 4, 1, 0),
    (100, 83, 66, 51, 38, 27, 17, 9, 4, 1, 0),
    (100, 83, 67, 54, 42, 30, 21, 13, 7, 3, 1, 0),
    (100, 83, 68, 56, 45, 34, 25, 17, 11, 6, 3, 1, 0),
    (100, 86, 71, 61, 49, 38, 29, 21, 15, 10, 6, 3, 1, 0),
    (100, 86, 71, 62, 50, 40, 31, 23, 17, 12, 8, 5, 3, 1, 0),
    (100, 88, 78, 68, 58, 48, 38, 30, 23, 17, 12, 8, 5, 3, 1, 0),
    (100, 88, 78, 68, 58, 48, 38, 30, 23, 17, 13, 9, 6, 4, 2, 1, 0),
    (100, 88, 78, 68, 58, 48, 38, 30, 23, 17, 13, 10, 7, 5, 3, 2, 1, 0),
    (100, 88, 78, 68, 59, 50, 41, 33, 26, 20, 15, 11, 8, 6, 4, 3, 2, 1, 0),
    (100, 88, 78, 68, 59, 50, 42, 34, 27, 21, 16, 12, 9, 7, 5, 4, 3, 2, 1, 0),
    (100, 88, 78, 68, 59, 50, 42, 34, 27, 21, 17, 13, 10, 8, 6, 5, 4, 3, 2, 1, 0),
)


def listed_timesteps(spacing: str, n: int, steps: int, is_xl: bool) -> Array:
    """Timesteps of "ays" or "gits" from the top to 0, as their authors list them; `steps` is T.

    Align Your Steps has one list, of ten steps; GITS one for each n up to 20, and the last beyond.
    """
    if spacing == "gits":
        return np.asarray(GITS[min(max(n, 2), len(GITS) + 1) - 2]) * ((steps - 1) / 100)
    return np.asarray(AYS["xl" if is_xl else "sd"]) * ((steps - 1) / 999)


def spaced_sigmas(
    spacing: str, n: int, sigma_max: float, sigma_min: float, rho: float | None = None
) -> Array:
    """Noise levels [n], from `sigma_max` down to `sigma_min`, of the spacings that are defined on them.

    - karras: ``(max^(1/rho) + u (min^(1/rho) - max^(1/rho)))^rho``, rho = 7; Karras et al. 2022, equation 5.
    - exponential, lu_lambdas: evenly spaced in log sigma; Lu et al. 2022, "DPM-Solver", section 3.3.
    - polyexponential: ``(1 - u)^rho`` of the way up in log sigma, rho = 1; k-diffusion.
    - beta: at the quantiles of a Beta(0.6, 0.6) distribution; Lee et al. 2024, "Beta Sampling is All You
      Need".
    - kl_optimal: evenly spaced in the angle ``atan(sigma)``; Sabour et al. 2024, "Align Your Steps", theorem
      3.1.
    - linear_quadratic: the first half falls by 2.5 %, evenly, the other ever faster, to 0 after the last;
      Genmo's Mochi, of whose levels, 1 to 0, these are `sigma_max` times. It has no `sigma_min`.
    """
    u = np.linspace(0, 1, n)
    rho = RHO.get(spacing, 1.0) if rho is None else rho
    match spacing:
        case "karras":
            top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
            sigmas = (top + u * (bottom - top)) ** rho
        case "exponential" | "lu_lambdas":
            sigmas = np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), n))
        case "polyexponential":
            sigmas = sigma_min * (sigma_max / sigma_min) ** ((1 - u) ** rho)
        case "kl_optimal":
            sigmas = np.tan(np.arctan(sigma_max) * (1 - u) + np.arctan(sigma_min) * u)
        case "linear_quadratic":
            sigmas = sigma_max * _linear_quadratic(n)
        case _:  # "beta"
            sigmas = sigma_min + beta_quantiles(u) * (sigma_max - sigma_min)
    return np.asarray(sigmas, dtype=np.float64)


def beta_quantiles(u: Array) -> Array:
    """Of a Beta(0.6, 0.6) distribution, falling from 1 as u rises from 0."""
    import scipy.stats

    return np.asarray(scipy.stats.beta.ppf(1 - u, 0.6, 0.6))


def _linear_quadratic(n: int, drop: float = 0.025) -> Array:
    """Levels [n] from 1 down: a line to ``1 - drop`` at half of the steps, then the parabola that goes on
    with its slope and ends at 0.
    """
    half = n // 2
    i = np.arange(n, dtype=np.float64)
    if half == 0:
        return np.ones(n)
    line = 1 - drop * i / half
    bend = (1 - drop * n / half) / (n - half) ** 2
    return np.where(i < half, line, line - bend * (i - half) ** 2)
