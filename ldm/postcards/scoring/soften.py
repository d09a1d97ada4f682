"""Renders made to look like what an autoencoder or a half-trained model leaves of them.

The scorer must read soft, noisy and slightly bent pictures as well as crisp ones, and must not call a
coloured blob a castle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def soften(images: Tensor, rng: Generator) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], each bent, blurred, shrunk, noised and tinted by its own chance.

    The result depends on `rng` alone; `images` is left as it is.
    """
    out = images.clone()
    for share, change in ((0.3, _bend), (0.35, _blurred), (0.3, _shrunk), (0.3, _noisy), (0.4, _tinted)):
        chosen = (torch.rand(len(out), generator=rng) < share).nonzero()[:, 0]
        if len(chosen):
            out[chosen] = change(out[chosen], rng)
    return out.clamp_(-1, 1)


def melt(images: Tensor, masks: Tensor, rng: Generator) -> Tensor:
    """Pictures whose objects are blurred past recognition where they stand: nothing is there to be named.

    images: [B, 3, H, W]; masks: float [B, 1, H, W], 1 where an object is.
    """
    size = images.shape[-1]
    sigma = size * _uniform(0.08, 0.14, rng)
    cover = (3 * blur(masks, 0.05 * size)).clamp(0, 1)  # hides the outline too
    weight = blur(masks, sigma)
    blob = blur(images * masks, sigma) / (weight + 1e-3)
    around = blur(images * (1 - masks), sigma) / (1 - weight + 1e-2)
    opacity = weight / weight.amax((2, 3), keepdim=True).clamp_min(1e-3)
    return images * (1 - cover) + cover * (around + opacity * (blob - around))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [..., H, W] by `sigma` pixels; at the edges only what is there is weighed.

    As two matrix products, which a CPU does several times faster than a depthwise convolution.
    """
    return _gaussian(x.shape[-2], sigma) @ x @ _gaussian(x.shape[-1], sigma).T


def _gaussian(n: int, sigma: float) -> Tensor:
    """[n, n]: row i weighs the pixels by their distance from i."""
    place = torch.arange(float(n))
    return (-((place[:, None] - place) ** 2) / (2 * sigma**2)).softmax(dim=1)


def _uniform(low: float, high: float, rng: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _blurred(x: Tensor, rng: Generator) -> Tensor:
    return blur(x, _uniform(0.5, 2.5, rng))


def _shrunk(x: Tensor, rng: Generator) -> Tensor:
    """Down to a fraction of the size and up again."""
    small = F.interpolate(x, scale_factor=_uniform(0.25, 0.6, rng), mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bilinear")


def _noisy(x: Tensor, rng: Generator) -> Tensor:
    strength = 0.12 * torch.rand(len(x), 1, 1, 1, generator=rng)
    return x + strength * torch.randn(x.shape, generator=rng)


def _tinted(x: Tensor, rng: Generator) -> Tensor:
    gain = 1 + 0.08 * (2 * torch.rand(len(x), 3, 1, 1, generator=rng) - 1)
    return x * gain + 0.05 * (2 * torch.rand(len(x), 3, 1, 1, generator=rng) - 1)


def _bend(x: Tensor, rng: Generator) -> Tensor:
    """A smooth random warp of about two hundredths of the picture."""
    b, _, h, w = x.shape
    flow = F.interpolate(0.05 * torch.randn(b, 2, 6, 6, generator=rng), (h, w), mode="bicubic")
    down, across = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    where = torch.stack([across, down], -1) + flow.permute(0, 2, 3, 1)
    return F.grid_sample(x, where, padding_mode="border", align_corners=True)
