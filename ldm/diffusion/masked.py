"""Drawing within a mask with a denoiser that knows of none: what is kept is put back at every noise level.

So any text-to-image model fills a mask. `Known.around` is a denoiser like any other: solvers work on each
value of the state apart, and none has to know of masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.schedule import Grid
from ldm.diffusion.solvers import Denoise, Denoised, Step


@dataclass(frozen=True, eq=False)
class Known:
    """What a mask keeps of pictures, on a run over `grid`.

    x0: their latents, [1 or B, C, h, w]. noise: unit noise, [B, C, h, w], the same at every level: that which
    the run begins with. mask: [1 or B, 1, h, w], 1 where they are drawn anew, 0 where they are kept, and
    between: there a share of the steps is drawn, 1 more than the whole ones in it (Levin and Fried 2023,
    "Differential Diffusion", algorithm 1). What a noisy solver has until then has its own noise.
    """

    grid: Grid
    x0: Tensor
    noise: Tensor
    mask: Tensor

    def around(self, denoise: Denoise) -> Denoise:
        """`denoise` of states whose kept part is the picture's own, ``x0 + sigma * noise``; so is its answer.

        ``x -> m x + (1 - m) (x0_known + sigma noise)``, ``x0 -> m x0 + (1 - m) x0_known``: Lugmayr et al.
        2022, "RePaint", equation 8, with noise that stays; in latents, Avrahami et al. 2023, "Blended Latent
        Diffusion". It is what diffusers' StableDiffusionInpaintPipeline does with a U-Net of 4 channels, down
        to the first state, which is as the run begins: at strength 1 noise alone.
        """

        def masked(x: Tensor, sigma: Tensor) -> Denoised:
            level = float(sigma)
            d = denoise(x if level == float(self.grid.sigmas[0]) else self._kept(x, level), sigma)
            drawn = self._drawn(level, 1)  # what is drawn from the next level on moves in this step already
            x0 = torch.where(drawn, d.x0, self.x0)
            anchor = x0 if d.anchor is d.x0 else torch.where(drawn, d.anchor, self.x0)
            return replace(d, x0=x0, anchor=anchor)

        return masked

    def put_back(self, step: Step) -> Step:
        """The step with its state's kept part as the next one sees it."""
        return replace(step, x=self._kept(step.x, step.sigma))

    def _kept(self, x: Tensor, sigma: float) -> Tensor:
        """A state at `sigma`, its kept part known; where the run ends without noise, if only almost at 0."""
        at_end = sigma == float(self.grid.sigmas[-1])
        known = self.x0 / self.grid.final_scale if at_end else self.x0 + sigma * self.noise
        return torch.where(self._drawn(sigma), x, known)

    def _drawn(self, sigma: float, more: int = 0) -> Tensor:
        """What is drawn anew at a level, or `more` steps after it, of bool [1 or B, 1, h, w]."""
        done = int((self.grid.sigmas >= sigma).sum()) - 1 + more
        left = 1 - done / (len(self.grid.sigmas) - 1)
        return (self.mask > 0) & (self.mask >= left)
