"""What the VAE alone loses: pictures through its encoder and decoder."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ldm.pipeline import Pipeline

Images = NDArray[np.uint8]  # [N, H, W, 3]


def latents_of(pipe: Pipeline, images: Images) -> Tensor:
    """The VAE's latents of uint8 pictures, fp32: means where it has a distribution."""
    return pipe.encode(torch.from_numpy(images).permute(0, 3, 1, 2).to(pipe.runtime.device) / 255).mean


def reconstructed(pipe: Pipeline, images: Images, batch_size: int = 16) -> Images:
    """Pictures through the VAE and back: no model of these latents can draw better ones."""
    parts = [
        to_uint8(pipe.decode(latents_of(pipe, images[i : i + batch_size])))
        for i in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)


def to_uint8(images: Tensor) -> Images:
    """[N, 3, H, W] in 0..1 -> [N, H, W, 3]."""
    bytes_ = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.asarray(bytes_.permute(0, 2, 3, 1).cpu().numpy())


def fitted(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of `size` (height, width): scaled by Lanczos until it covers it, its middle cut out."""
    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))


def ssim(a: Images, b: Images) -> NDArray[np.float64]:
    """Structural similarity of each picture: Gaussian window of 11 pixels, sigma 1.5, on RGB in 0..1.

    Borders are mirrored, and all positions and channels averaged. Wang et al. 2004, "Image quality
    assessment", eq. 13; the arithmetic is torchmetrics'.

    a, b: uint8 [N, H, W, 3], at least 6 pixels high and wide. Returns float64 [N].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.from_numpy(each).permute(0, 3, 1, 2).float() / 255 for each in (a, b))
    values = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return np.asarray(values.double().numpy())
