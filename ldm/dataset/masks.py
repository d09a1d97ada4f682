"""Random masks, of which inpainting is learnt."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.train.loss_recipe import MaskSection


def random_masks(
    count: int, size: tuple[int, int], rng: torch.Generator, options: MaskSection | None = None
) -> Tensor:
    """Masks [count, 1, H, W] of a (height, width) in pixels: 1 where the picture is drawn anew, else 0.

    In the spirit of LaMa's training masks (Suvorov et al. 2022, arXiv 2109.07161, section 2.3). `rng` is on
    the CPU and the only source of randomness.
    """
    shares = torch.tensor((options or MaskSection()).shares, dtype=torch.float64)
    kinds = torch.multinomial(shares, count, replacement=True, generator=rng).tolist()
    return torch.stack([_MAKERS[kind](size, rng) for kind in kinds])[:, None]


def _some(rng: torch.Generator) -> int:
    return int(torch.randint(1, 4, (), generator=rng))


def _rectangles(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """One to three, of sides from a tenth to three fifths of the picture's; some reach beyond its edges."""
    mask = torch.zeros(size)
    extent = torch.tensor(size)
    for _ in range(_some(rng)):
        centre = torch.rand(2, generator=rng) * extent
        half = (0.05 + 0.25 * torch.rand(2, generator=rng)) * extent
        top, left = (centre - half).clamp(min=0).long().tolist()
        bottom, right = (centre + half).ceil().long().tolist()
        mask[top:bottom, left:right] = 1
    return mask


def _strokes(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """One to three chains of lines between three to eight points, 3 to 15 % of the shorter side wide."""
    height, width = size
    image = Image.new("L", (width, height))
    pen = ImageDraw.Draw(image)
    for _ in range(_some(rng)):
        corners = int(torch.randint(3, 9, (), generator=rng))
        points = (torch.rand(corners, 2, generator=rng) * torch.tensor([width, height])).tolist()
        brush = math.ceil((0.03 + 0.12 * float(torch.rand((), generator=rng))) * min(size))
        pen.line([(x, y) for x, y in points], fill=255, width=brush)
        for x, y in points:  # round joints and ends
            pen.circle((x, y), brush / 2, fill=255)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def _whole(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    return torch.ones(size)


def _none(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    return torch.zeros(size)


_MAKERS = (_rectangles, _strokes, _whole, _none)  # in the order of MaskSection.shares


def masked_pictures(pictures: Tensor, masks: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1, grey (0) where masks [B, 1, H, W] are 1: what the VAE encodes."""
    return torch.where(masks > 0, 0.0, pictures)
