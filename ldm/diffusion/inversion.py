"""From a picture to the noise that draws it, and back; and an edit: back under another prompt.

`ddim_invert` walks the probability-flow ODE upwards by Euler's steps, each with the noise estimate of the
level that it starts from, so the way back differs from it by the ODE's error. `bdia_invert` and `bdia` are
exact inverses of each other up to rounding: Zhang et al. 2023, "Exact Diffusion Inversion via Bi-directional
Integration Approximation", equations 17 and 19, which in sigma space need no scaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
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


def fading_gamma(steps: int, fade: float = 8.0) -> float:
    """The gamma that leaves ``exp(-fade)`` of an oscillation at the end of `steps` steps.

    With gamma 1 the leapfrog keeps what a step's error, or another prompt on the way back, sets swinging
    between even and odd steps: edits come out as stains. A fixed gamma fades more over more steps.
    """
    return math.exp(-fade / steps)


def bdia_invert(denoise: Denoise, x0: Tensor, sigmas: Tensor, gamma: float = 1.0) -> list[Tensor]:
    """The states at each of `sigmas`, of which `bdia` draws exactly this picture again from the first two.

    Needs two levels above 0. Arguments as in `ddim_invert`; `gamma` as in `bdia`.
    """
    levels = sigmas.to(x0)
    path = [x0 + levels[-2] * _eps(denoise, x0, sigmas[-2]), x0]  # built from the picture up
    for i in range(len(sigmas) - 2, 0, -1):
        x, lower = path[:2]
        eps = _eps(denoise, x, sigmas[i])
        down, up = (levels[i + 1] - levels[i]) * eps, (levels[i - 1] - levels[i]) * eps
        path.insert(0, x + (lower - x - down) / gamma + up)
    return path


def bdia(
    denoise: Denoise, path: Sequence[Tensor], sigmas: Tensor, gamma: float = 1.0, mask: Tensor | None = None
) -> Iterator[Step]:
    """Draw from two neighbouring states: ``x'' = x' + d_down + gamma ((x - x') - d_up)``.

    ``d_down`` and ``d_up`` are Euler's steps from x' to the next level and back to the last one, by one noise
    estimate. Gamma 1 is the leapfrog; 0 would be DDIM, which cannot be inverted.

    Args:
        path: the two states at ``sigmas[0]`` and ``sigmas[1]``; with a mask one at each level.
        mask: bool [B or 1, 1, H, W]; where it is False the state is that of `path`, to the last bit.
    """
    levels, (x, x_next) = sigmas.to(path[0]), path[:2]
    for i in range(1, len(sigmas) - 1):
        d = denoise(x_next, sigmas[i])
        eps = (x_next - d.anchor) / levels[i]
        down, up = (levels[i + 1] - levels[i]) * eps, (levels[i - 1] - levels[i]) * eps
        x, x_next = x_next, x_next + down + gamma * (x - x_next - up)
        if mask is not None:
            x_next = torch.where(mask, x_next, path[i + 1])
        yield Step(i, float(sigmas[i + 1]), x_next, d.x0)


def edit_mask(
    source: Denoise, target: Denoise, path: Sequence[Tensor], sigmas: Tensor, threshold: float = 0.1
) -> Tensor:
    """Where two prompts see another picture in the states of an inversion: bool [B, 1, H, W].

    Where the root mean square over channels of ``x0_target - x0_source``, on the mean of four levels, is
    above `threshold`, in latents, whose spread is about 1. DiffEdit (Couairon et al. 2023, section 3.2) takes
    noised pictures and a share of the largest difference; the states of the inversion need no averaging over
    noises, and with a fixed threshold an edit of everything is one.
    """
    seen = []
    for i in torch.linspace(0, len(sigmas) - 2, min(4, len(sigmas) - 1)).round().int().tolist():
        gap = target(path[i], sigmas[i]).x0 - source(path[i], sigmas[i]).x0
        seen.append(gap.square().mean(1, keepdim=True).sqrt())
    return torch.stack(seen).mean(0) > threshold


def _eps(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    return (x - denoise(x, sigma).anchor) / float(sigma)
