"""How pictures of earlier requests are drawn, so that they can be drawn again equal: the whole list.

Since version 4 words that a model does not know are drawn as the things that its table names
(`ldm.prompts.world`); before, as they are written (`ldm.pipeline.deciding.resolve`).

Since version 3 prompts are read for weights, edits over the steps and composition; before, as text
(`Request.grammar`).

Since version 2, as in diffusers (a mask's alpha as in programs that paint masks):

- The image's latents of a VAE without a distribution (AutoencoderTiny) take no unit noise from the seed.
- A latent consistency model draws all its steps from an image, over the `strength` of its timesteps; before,
  only the last `strength` of the steps.
- DPM++ 2M, 2S, 2M SDE and UniPC heed `lower_order_final`, and from an image the place within the whole grid.
- A mask with transparent parts is its alpha; before, it was laid on white like a picture.
- Of a seed above 32 bits all are heeded; before, the lower 32 only.
- Align Your Steps has a list for SDXL, and other counts than 10 steps lie evenly in the log of sigma.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ldm.diffusion.catalogue import Sampler
from ldm.diffusion.schedule import Grid, Schedule
from ldm.diffusion.spacings import AYS


def align_your_steps(schedule: Schedule, sampler: Sampler, n: int) -> Grid:
    """The list of Stable Diffusion 1.5 for every model, other counts evenly among its timesteps."""
    t = np.interp(np.arange(n) * 10 / n, np.arange(11), AYS["sd"])
    t *= (len(schedule.alphas_cumprod) - 1) / 999
    grid = schedule.grid(None, sampler=sampler, timesteps=t.tolist())
    return replace(grid, initial_scale=math.hypot(float(grid.sigmas[0]), 1))
