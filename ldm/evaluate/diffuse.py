"""A picture on its way to noise and back, as a sheet that one can look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.diffusion.forward import q_sample, snr
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import PURE_NOISE
from ldm.errors import UserError
from ldm.images.fitting import fit_image
from ldm.images.pixels import contact_sheet, to_pil
from ldm.pipeline import Inputs, Pipeline
from ldm.request import Request

CAPTION = 34  # pixels: three lines of Pillow's own font
MAX_COLUMNS = 20


def timesteps(training_steps: int, columns: int) -> list[int]:
    """From 0 to the last training timestep, evenly. Raises UserError for fewer than 2 columns or too many."""
    if not 2 <= columns <= min(MAX_COLUMNS, training_steps):
        raise UserError(f"{columns} columns are not allowed: give 2 to {min(MAX_COLUMNS, training_steps)}")
    return [round(t) for t in np.linspace(0, training_steps - 1, columns)]


def noised(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, ts: Sequence[int]) -> list[Tensor]:
    """``q(x_t | x_0)`` at each t, of one and the same noise: [1, C, H, W] each."""
    return [q_sample(x0, noise, alphas_cumprod[t].to(x0)) for t in ts]


def diffuse_sheet(
    pipe: Pipeline, image: Image.Image, prompt: str, columns: int = 8, seed: int = 0
) -> Image.Image:
    """Three rows: the forward process on pixels and on latents (decoded); the reverse process, backwards.

    The reverse process begins at the last column with the forward process' own noise and takes one DDPM step
    a column; the column of t shows the state there, decoded, as the one above it.

    Raises:
        UserError: for a number of columns that is not allowed.
    """
    a = pipe.schedule.alphas_cumprod
    ts = timesteps(len(a), columns)
    size = pipe.resolve(Request()).size
    pixels = 2 * fit_image(image, size) - 1
    forward = noised(pixels, Noise([seed]).initial(tuple(pixels.shape[1:])), a, ts)  # type: ignore[arg-type]
    rows = [(torch.cat(forward) / 2 + 0.5).clamp(0, 1)]

    latents = pipe.encode(pixels / 2 + 0.5).mean
    noise = Noise([seed]).initial(tuple(latents.shape[1:])).to(latents)  # type: ignore[arg-type]
    states = noised(latents, noise, a, ts)
    rows.append(torch.cat([pipe.decode(state) for state in states]))

    falling = tuple(float(t) for t in ts[:0:-1])
    request = Request(prompt=prompt, seeds=(seed,), sampler="ddpm", timesteps=falling)
    steps = [step.latents for step in pipe.denoise(request, Inputs(latents=noise.cpu()))]
    rows.append(torch.cat([pipe.decode(state) for state in (*steps[::-1], states[-1])]))

    captions = [_caption(t, pipe.schedule.sigma(t)) for t in ts]
    pictures = [
        _with_caption(image, text) for row in rows for image, text in zip(to_pil(row), captions, strict=True)
    ]
    return contact_sheet(pictures, columns)


def _caption(t: int, sigma: Tensor) -> str:
    if sigma >= PURE_NOISE:  # a finite number that stands for infinity
        return f"t {t}\nsigma infinite\nSNR 0"
    return f"t {t}\nsigma {float(sigma):.3g}\nSNR {float(snr(sigma)):.3g}"


def _with_caption(image: Image.Image, text: str) -> Image.Image:
    sheet = Image.new("RGB", (image.width, image.height + CAPTION), "white")
    sheet.paste(image, (0, 0))
    ImageDraw.Draw(sheet).multiline_text((2, image.height), text, fill="black", spacing=0, font_size=10)
    return sheet
