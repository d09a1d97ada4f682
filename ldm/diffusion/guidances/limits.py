"""Guidances that look at how far values go, and at coarse and fine structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.guidances.part import Answer, Part, Rank, option


@dataclass(frozen=True)
class DynamicThresholding(Part):
    """x0 whose channels reach no further from their means than those of a smaller scale, `mimic`, would.

    With m the largest distance there, q the `percentile` of the distances here and t the larger of both:
    ``mean + clamp(x0 - mean, -t, t) m / t``, channel by channel. At a high scale it keeps what that draws and
    loses its saturation.
    """

    name = "dynamic_thresholding"
    label = "Dynamic thresholding"
    source = (
        "Saharia et al. 2022 (arXiv 2205.11487), section 2.3; the mimic scale is sd-dynamic-thresholding's"
    )
    rank = Rank.FINISHES
    aliases = ("dynthres", "dynthresh", "cfgscalefix")
    mimic: float = option(7.0, 0.0, 100.0)
    percentile: float = option(1.0, 0.0, 1.0)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("uncond",)

    def change(self, a: Answer) -> Answer:
        x0, mimic = (
            a.x0(output).flatten(2) for output in (a.guided, a.uncond + self.mimic * (a.cond - a.uncond))
        )
        mean = x0.mean(2, keepdim=True)
        far = (mimic - mimic.mean(2, keepdim=True)).abs().amax(2, keepdim=True)
        reached = torch.quantile((x0 - mean).abs(), self.percentile, dim=2, keepdim=True)
        top = torch.maximum(far, reached)
        return a.moved((mean + (x0 - mean).clamp(-top, top) / top * far).view_as(a.x))


@dataclass(frozen=True)
class FrequencyDecoupled(Part):
    """FDG: coarse structure is guided less than detail.

    ``uncond + scale (d - L(d)) + low L(d)``, where d is cond - uncond and L(d) the coarsest of `levels` in
    its Laplacian pyramid, at full size again. Without `low` half of the scale, and at least 1.
    """

    name = "fdg"
    label = "FDG"
    source = "Sadat et al. 2025 (arXiv 2506.19713), algorithm 2"
    rank = Rank.COMBINES
    aliases = ("frequencydecoupled", "frequencydecoupledguidance")
    low: float | None = option(None, 0.0, 100.0, float)
    levels: int = option(2, 2, 8)

    def change(self, a: Answer) -> Answer:
        difference = a.cond - a.uncond
        low = max(1.0, a.scale / 2) if self.low is None else self.low
        return a.led(a.uncond + a.scale * difference + (low - a.scale) * coarse(difference, self.levels - 1))


def coarse(x: Tensor, times: int) -> Tensor:
    """x [B, C, H, W] blurred and halved so many times, and enlarged and blurred as often.

    Burt and Adelson 1983, "The Laplacian Pyramid as a Compact Image Code", equations 1 and 2, with bilinear
    sizes as in kornia; sides of less than 3 stay as they are.
    """
    size = x.shape[2:]
    if times == 0 or min(size) < 3:
        return x
    half = F.interpolate(_blurred(x), [side // 2 for side in size], mode="bilinear")
    return _blurred(F.interpolate(coarse(half, times - 1), size, mode="bilinear"))


def _blurred(x: Tensor) -> Tensor:
    """By the binomial filter of 5, along both sides."""
    filters = x.new_tensor([1, 4, 6, 4, 1]) / 16
    planes = F.pad(x, (2, 2, 2, 2), mode="reflect").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(planes, filters[None, None, None]), filters[None, None, :, None])
    return blurred.view_as(x)
