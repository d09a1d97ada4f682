"""From a picture to the noise that draws it, and back.

`ddim_invert` walks the probability-flow ODE upwards by Euler's steps, each with the noise estimate of the
level that it starts from, so the way back differs from it by the ODE's error. `bdia_invert` and `bdia` are
exact inverses of each other up to rounding: Zhang et al. 2023, "Exact Diffusion Inversion via Bi-directional
Integration Approximation", equations 17 and 19, which in sigma space need no scaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.solvers import Denoise, Step


def ddim_invert(denoise: Denoise, x0: Tensor, sigmas: Tensor) -> Tensor:
    """The state at ``sigmas[0]`` of a picture; ``x' = x + (sigma' - sigma) eps(x)`` from the lowest level up.

    Song et al. 2021, "DDIM", section 4.3. The first step has no level of its own to ask the network at: its
    noise estimate is that of the picture itself at the lowest level above 0.

    Args:
        denoise: as for a solver.
        x0: latents [B, C, H, W].
        sigmas: the falling levels of the run, float64, with its last 0.
    """
    x = x0
    for sigma, sigma_next in pairwise(sigmas.flip(0)):
        level = sigma if sigma > 0 else sigma_next
        x = x + (sigma_next - sigma).to(x) * _eps(denoise, x, level)
    return x


def bdia_invert(denoise: Denoise, x0: Tensor, sigmas: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """The states at ``sigmas[0]`` and ``sigmas[1]`` from which `bdia` draws exactly this picture.

    Needs two levels above 0. Arguments as in `ddim_invert`; `gamma` as in `bdia`.
    """
    levels = sigmas.to(x0)
    lower, x = x0, x0 + levels[-2] * _eps(denoise, x0, sigmas[-2])
    for i in range(len(sigmas) - 2, 0, -1):
        eps = _eps(denoise, x, sigmas[i])
        down, up = (levels[i + 1] - levels[i]) * eps, (levels[i - 1] - levels[i]) * eps
        lower, x = x, x + (lower - x - down) / gamma + up
    return x, lower


def bdia(denoise: Denoise, x: Tensor, x_next: Tensor, sigmas: Tensor, gamma: float = 1.0) -> Iterator[Step]:
    """Draw from two neighbouring states: ``x'' = x' + d_down + gamma ((x - x') - d_up)``.

    ``d_down`` and ``d_up`` are Euler's steps from x' to the next level and back to the last one, by one noise
    estimate. Gamma 1 is the leapfrog; 0 would be DDIM, which cannot be inverted.
    """
    levels = sigmas.to(x)
    for i in range(1, len(sigmas) - 1):
        d = denoise(x_next, sigmas[i])
        eps = (x_next - d.anchor) / levels[i]
        down, up = (levels[i + 1] - levels[i]) * eps, (levels[i - 1] - levels[i]) * eps
        x, x_next = x_next, x_next + down + gamma * (x - x_next - up)
        yield Step(i, float(sigmas[i + 1]), x_next, d.x0)


def _eps(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    return (x - denoise(x, sigma).anchor) / sigma.to(x)
