"""Bounds on x0 that some scheduler configs ask for: made for pixels, which end at -1 and 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.solvers import Denoise, Denoised


@dataclass(frozen=True)
class Bounds:
    """What diffusers' keys of these names say; as there, `thresholding` goes before `clip_sample`."""

    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 [B, C, H, W], bounded.

        Dynamic thresholding clamps each picture to ``+-s`` and divides it by s, the quantile of its absolute
        values between 1 and the maximum; Saharia et al. 2022, "Imagen", section 2.3.
        """
        if self.thresholding:
            values = x0.flatten(1).abs()
            s = torch.quantile(values, self.dynamic_thresholding_ratio, dim=1).clamp(1, self.sample_max_value)
            s = s.reshape(-1, 1, 1, 1)
            return x0.clamp(-s, s) / s
        return x0.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else x0

    def around(self, denoise: Denoise, keeps_noise: bool) -> Denoise:
        """`denoise` with its x0 bounded. With `keeps_noise` the state's noise stays that about x0 as it was.

        DDIM does that, whose two terms diffusers takes from the network separately; others see x0 alone.
        """

        def bounded(x: Tensor, sigma: Tensor) -> Denoised:
            d = denoise(x, sigma)
            x0 = self(d.x0)
            anchor = d.anchor if keeps_noise or d.anchor is not d.x0 else x0
            return Denoised(x0, anchor, d.log_variance)

        return bounded
