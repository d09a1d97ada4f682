"""Masks made ready, on the picture that they cover: extended, inverted, grown, feathered, cut out, filled.

A mask is grey ("L"), white where the picture is drawn anew.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from ldm.images.fitting import OneInMemory
from ldm.images.pixels import to_pil, to_tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom


def as_image(image: OneInMemory, mode: str) -> Image.Image:
    """A tensor [1, 1 or 3, H, W] in 0..1 rounded to 8 bits; "L" or "RGB"."""
    if isinstance(image, Tensor):
        (image,) = to_pil(image.expand(-1, 3, -1, -1))
    return image.convert(mode)


def extended(image: Image.Image, mask: Image.Image | None, sides: Box) -> tuple[Image.Image, Image.Image]:
    """A larger picture, and a mask of what is new; `sides` are pixels beyond left, top, right and bottom.

    What is new repeats the edge; a mask that is given goes on covering what it covers.
    """
    left, top, right, bottom = sides
    pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    covered = Image.new("L", (pixels.shape[1], pixels.shape[0]), 255)
    covered.paste(mask.resize(image.size) if mask else 0, (left, top, left + image.width, top + image.height))
    return Image.fromarray(pixels), covered


def shaped(mask: Image.Image, invert: bool, grow: int, soft: bool) -> Image.Image:
    """Inverted, then grown by so many pixels to each side, or shrunk; black and white unless it is `soft`."""
    mask = ImageChops.invert(mask) if invert else mask
    mask = mask if soft else mask.point([0] * 128 + [255] * 128)
    if not grow:
        return mask
    widest = ImageFilter.MaxFilter if grow > 0 else ImageFilter.MinFilter
    for radius in _radii(abs(grow)):
        mask = mask.filter(widest(2 * radius + 1))
    return mask


def _radii(total: int, most: int = 8) -> list[int]:
    """Radii that sum to `total`: a square filter is as good in parts, and faster."""
    return [most] * (total // most) + ([total % most] if total % most else [])


def feathered(mask: Image.Image, radius: float) -> Image.Image:
    """With a soft edge, of a Gaussian of `radius` pixels: what AUTOMATIC1111 and diffusers call blur."""
    return mask.filter(ImageFilter.GaussianBlur(radius)) if radius else mask


def crop_region(mask: Image.Image, size: tuple[int, int], padding: int) -> Box | None:
    """What a mask covers with `padding` pixels around it, in the shape of (height, width) where that fits.

    As diffusers' VaeImageProcessor.get_crop_region has it. None for a mask that covers nothing.
    """
    covered = mask.getbbox()
    if covered is None:
        return None
    sides = []
    for low, high, length in zip(covered[:2], covered[2:], mask.size, strict=True):
        sides.append((max(low - padding, 0), min(high + padding, length)))
    (left, right), (top, bottom) = sides
    ratio = size[1] / size[0]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widened(top, bottom, int((right - left) / ratio), mask.height)
    else:
        left, right = _widened(left, right, int((bottom - top) * ratio), mask.width)
    return left, top, right, bottom


def _widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """A span of `length` around low..high, moved into 0..limit, or cut to it."""
    more = length - (high - low)
    low, high = low - more // 2, high + more - more // 2
    if high > limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, min(high - low, limit)
    return low, high


def filled(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] whose part under masks [B, 1, H, W] smoothly continues what is around it.

    Push-pull (Gortler et al. 1996, "The Lumigraph", section 3.4.3): the mean of what is known in squares of
    2, 4, 8, ... pixels; each hidden pixel takes that of the smallest square that knows any.
    """
    known = (mask <= 0).to(pixels)
    if not known.any():
        return torch.full_like(pixels, 0.5)
    return _pulled(pixels * known, known)


def _pulled(sums: Tensor, weights: Tensor) -> Tensor:
    """``sums / weights`` where weights are not 0, elsewhere from squares twice as large."""
    if bool((weights > 0).all()):
        return sums / weights
    height, width = sums.shape[-2:]
    pad = (0, width % 2, 0, height % 2)
    coarse = _pulled(*(4 * F.avg_pool2d(F.pad(each, pad), 2) for each in (sums, weights)))
    above = F.interpolate(coarse, scale_factor=2.0, mode="bilinear")[..., :height, :width]
    return torch.where(weights > 0, sums / weights.clamp(min=1), above)


def pasted(images: Tensor, picture: Tensor, share: Tensor, box: Box | None) -> Tensor:
    """What is drawn [B, 3, h, w] in its place in the picture [1 or B, 3, H, W], all in 0..1.

    `share` [1 or B, 1, H, W] of each pixel is drawn; where it is 0 or 1 either one's own bits are kept. What
    is drawn within a `box` is resized to it.
    """
    if box is not None:
        left, top, right, bottom = box
        whole = picture.to(images).expand(len(images), -1, -1, -1).clone()
        size = right - left, bottom - top
        small = [each.resize(size, Image.Resampling.LANCZOS) for each in to_pil(images)]
        whole[..., top:bottom, left:right] = to_tensor(small).to(images)
        images = whole
    picture, share = picture.to(images), share.to(images)
    mixed = torch.where(share < 1, torch.lerp(picture, images, share), images)
    return torch.where(share > 0, mixed, picture)
