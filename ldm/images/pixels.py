"""Tensors and PIL images of finished pictures, and sheets of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

GRID_GAP = 2  # pixels


def to_numpy(images: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[B, C, H, W] in 0..1 -> float32 [B, H, W, C] in 0..1. Raises ValueError on NaN and Inf."""
    array: np.ndarray[Any, np.dtype[np.float32]] = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    if not np.isfinite(array).all():
        raise ValueError("the picture holds NaN or Inf, and is not written")
    return array.clip(0, 1)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in 0..1 -> B RGB images, rounded to the nearest of 256 levels, as diffusers does; with
    alpha [B, 4, H, W] RGBA.
    """
    return [Image.fromarray(array) for array in (to_numpy(images) * 255).round().astype(np.uint8)]


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
    """One or several images of one size -> float32 [B, 3, H, W] in 0..1; alpha is dropped."""
    images = [images] if isinstance(images, Image.Image) else images
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images side by side, `columns` in each row, with a narrow black gap; the largest says how far apart."""
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    width, height = (max(sides) + GRID_GAP for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width + GRID_GAP, rows * height + GRID_GAP))
    for k, image in enumerate(images):
        sheet.paste(image, (GRID_GAP + k % columns * width, GRID_GAP + k // columns * height))
    return sheet
