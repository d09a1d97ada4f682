"""Spacings: which timesteps or noise levels an n-step run visits.

A spacing is one idea, but the samplers of diffusers each round, count and offset it in their own way.
`family` tells them apart:

- ``vp``: DDIM, DDPM, PNDM. Whole timesteps.
- ``k``: Euler, Euler ancestral, Heun, LMS, DPM++ SDE. Fractional timesteps.
- ``dpm``: DPM++ 2M, 2S, 2M SDE and UniPC. n + 1 points, of which the last is not visited.
"""

import numpy as np
import numpy.typing as npt

from ldm.spelling import squash, unknown

Array = npt.NDArray[np.float64]

SIGMA_SPACINGS = ("karras", "exponential", "beta")
SPACINGS = ("leading", "trailing", "linspace", *SIGMA_SPACINGS, "ays", "sgm_uniform", "simple", "lcm")

_ALIASES = {
    "alignyoursteps": "ays",
    "uniform": "linspace",
    "normal": "linspace",
    "sgm": "sgm_uniform",
}

# Zero terminal SNR makes the last sigma infinite. This stands for that: x / sigma is the noise to the last
# bit, and all is finite in fp32.
PURE_NOISE = 1e10

# Sabour et al. 2024, "Align Your Steps", table of Stable Diffusion 1.5 for T = 1000.
_AYS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)


def spacing_names() -> dict[str, str]:
    """Every accepted spelling, squashed, with the spacing it means."""
    return {squash(name): name for name in SPACINGS} | _ALIASES


def resolve_spacing(name: str) -> str:
    """The canonical name of a spacing in any spelling ("Karras", "SGM Uniform").

    Raises:
        UserError: if there is none of that name; the message holds the nearest ones.
    """
    found = spacing_names().get(squash(name))
    if found is None:
        raise unknown("spacing", name, SPACINGS)
    return found


def spaced_timesteps(spacing: str, n: int, family: str, steps: int, offset: int, lcm_steps: int) -> Array:
    """Timesteps [n], falling, of the spacings that are defined on timesteps.

    `steps` is T, the number of training timesteps; `offset` is diffusers' ``steps_offset`` (leading only);
    `lcm_steps` its ``original_inference_steps`` (lcm only). Lin et al. 2023, "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", table 2, names leading, linspace and trailing.
    """
    i = np.arange(n, dtype=np.float64)
    t: Array
    match spacing:
        case "leading" if family == "dpm":
            t = (n - i) * (steps // (n + 1))
            t = t + min(offset, steps - 1 - t[0])
        case "leading":
            t = (n - 1 - i) * (steps // n)
            t = t + min(offset, steps - 1 - t[0])
        case "trailing":
            t = np.arange(steps, 0, -steps / n)[:n].round() - 1
        case "linspace" if family == "dpm":
            t = np.linspace(0, steps - 1, n + 1).round()[:0:-1].copy()
        case "linspace":
            t = np.linspace(0, steps - 1, n)[::-1].copy()
            t = t.round() if family == "vp" else t
        case "ays":
            t = np.interp(i * 10 / n, np.arange(11), _AYS) * ((steps - 1) / 999)
        case "sgm_uniform":
            t = np.linspace(steps - 1, 0, n + 1)[:-1]
        case "simple":
            t = steps - 1 - np.floor(i * steps / n)
        case _:  # "lcm": every so many of the timesteps that the model was distilled on
            distilled = np.arange(lcm_steps, 0.0, -1) * (steps // lcm_steps) - 1
            t = distilled[np.floor(np.linspace(0, lcm_steps, n, endpoint=False)).astype(np.int64)]
    return t


def spaced_sigmas(spacing: str, n: int, sigma_max: float, sigma_min: float) -> Array:
    """Noise levels [n], from `sigma_max` down to `sigma_min`, of the spacings that are defined on them.

    - karras: ``(max^(1/7) + u (min^(1/7) - max^(1/7)))^7``; Karras et al. 2022, equation 5.
    - exponential: evenly spaced in log sigma.
    - beta: at the quantiles of a Beta(0.6, 0.6) distribution; Lee et al. 2024, "Beta Sampling is All You
      Need".
    """
    u = np.linspace(0, 1, n)
    match spacing:
        case "karras":
            top, bottom = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
            sigmas = (top + u * (bottom - top)) ** 7
        case "exponential":
            sigmas = np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), n))
        case _:  # "beta"
            import scipy.stats

            sigmas = sigma_min + scipy.stats.beta.ppf(1 - u, 0.6, 0.6) * (sigma_max - sigma_min)
    return np.asarray(sigmas, dtype=np.float64)
