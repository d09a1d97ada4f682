"""Guidance away from what the network says when its self-attention is disturbed.

What is done in attention's place is in `ldm/pipeline/steering/perturbed.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.guidances.part import Answer, Part, Rank, option


@dataclass(frozen=True)
class Disturbed(Part):
    """``guided + scale (cond - disturbed)``, between two shares of the timesteps.

    layers: "mid", "down.1", "up.0" or more of a layer's name, several with "/" between them.
    """

    rank = Rank.ADDS
    scale: float = option(3.0)
    layers: str = option("mid")
    start: float = option(0.0, 0.0, 1.0)
    stop: float = option(1.0, 0.0, 1.0)

    @property
    def reads(self) -> tuple[str, ...]:
        return (f"cond:{self.name}",)

    @property
    def names(self) -> list[str]:
        """Of layers."""
        return [each for each in self.layers.split("/") if each.strip()]

    def change(self, a: Answer) -> Answer:
        (branch,) = self.reads
        return a.led(a.guided + self.scale * (a.cond - a.outputs[branch]))


@dataclass(frozen=True)
class PerturbedAttention(Disturbed):
    """Each pixel attends to itself alone: its values are what self-attention gives."""

    name = "pag"
    label = "Perturbed-attention guidance"
    source = "Ahn et al. 2024 (arXiv 2403.17377), equations 13 and 14"
    aliases = ("perturbedattention",)


@dataclass(frozen=True)
class SmoothedEnergy(Disturbed):
    """Queries are blurred by a Gaussian of `sigma` pixels of the layer; inf: each is the mean of all."""

    name = "seg"
    label = "Smoothed energy guidance"
    source = "Hong 2024 (arXiv 2408.00760), equations 12 and 13"
    aliases = ("smoothedenergy",)
    sigma: float = option(math.inf, 0.1, math.inf)


@dataclass(frozen=True)
class SkipLayer(Disturbed):
    """Transformer blocks are left out."""

    name = "slg"
    label = "Skip-layer guidance"
    source = "Hyung et al. 2024 (arXiv 2411.18664), section 3.2; as in Stable Diffusion 3.5 by its authors"
    aliases = ("skiplayers",)
    scale: float = option(2.8)
    start: float = option(0.01, 0.0, 1.0)
    stop: float = option(0.2, 0.0, 1.0)


@dataclass(frozen=True)
class SelfAttention(Part):
    """``guided + scale (output - output of the state with what is attended to most blurred)``.

    Where the middle's self-attention gives a pixel more than its share, x0 is blurred by a Gaussian of `blur`
    latents, the noise of the state is put back, and the network asked once more; of the branch without the
    text, if there is one. Beside each branch's output it reads what the middle's attention gave ([B, h, w],
    ":middle" behind the branch's name: `ldm.pipeline.steering.perturbed.Middle`).
    """

    name = "sag"
    label = "Self-attention guidance"
    source = "Hong et al. 2023 (arXiv 2210.00939), equations 13 to 17"
    rank = Rank.ADDS
    scale: float = option(0.75)
    blur: float = option(1.0, 0.1, 100.0)

    def change(self, a: Answer) -> Answer:
        branch = "uncond" if "uncond" in a.outputs else "cond"
        output, given = a.outputs[branch], a.outputs[f"{branch}:middle"]
        x0 = a.x0(output)
        mask = F.interpolate((given > 1).to(x0)[:, None], x0.shape[-2:])
        degraded = a.x + mask * (blurred(x0, self.blur, 9) - x0)
        again = a.predict(degraded, a.sigma, (branch,))[branch]
        return a.led(a.guided + self.scale * (output - again))


def blurred(x: Tensor, sigma: float, size: int | None = None) -> Tensor:
    """[B, C, H, W] blurred by a Gaussian of `sigma` pixels, edges mirrored; inf: the mean of each picture.

    The kernel has `size` pixels a side, by default 6 sigma, and at most one more than the picture.
    """
    if math.isinf(sigma):
        return x.mean((-2, -1), keepdim=True).expand_as(x)
    for axis in (-2, -1):
        length = x.shape[axis]
        wide = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2 if size is None else size
        half = min(wide, length - (length % 2 - 1)) // 2
        at = torch.arange(-half, half + 1, device=x.device, dtype=torch.float32)
        kernel = (-0.5 * (at / sigma) ** 2).exp()
        kernel = (kernel / kernel.sum()).to(x)
        sides = (0, 0, half, half) if axis == -2 else (half, half, 0, 0)
        planes = F.pad(x.flatten(0, 1)[:, None], sides, mode="reflect")
        shape = (1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1)
        x = F.conv2d(planes, kernel.reshape(shape)).reshape(x.shape)
    return x
