"""Images that pictures are drawn from: from a file or from memory, fitted to the picture's size."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError, reason
from ldm.files import check_unchanged
from ldm.images.opening import open_picture, read_bytes, to_mask, to_rgb
from ldm.images.pixels import to_tensor

# A tensor is [3, H, W] or [1, 3, H, W] in 0..1; of a mask [H, W], [1, H, W] or [1, 1, H, W]. Several of them
# are one for each prompt.
OneInMemory = Image.Image | Tensor
InMemory = OneInMemory | tuple[OneInMemory, ...]


def read_file(
    path: str, sha256: str | None = None, convert: Callable[[Image.Image], Image.Image] = to_rgb
) -> tuple[Image.Image, str]:
    """An upright image, RGB or by `to_mask` grey, and the SHA-256 of the file's bytes.

    Raises:
        UserError: if the file is not a picture, or its SHA-256 is not the one given.
    """
    if re.match("https?://", str(path)):
        raise UserError(f"{path}: addresses are not fetched: save the picture, and give its path")
    data = read_bytes(path)
    image, digest = open_picture(path, io.BytesIO(data), convert), hashlib.sha256(data).hexdigest()
    check_unchanged(path, digest, sha256)
    return image, digest


def take(image: InMemory | None, channels: int) -> InMemory | None:
    """A tensor as [1, channels, H, W]; a PIL image as RGB, or with one channel as a mask (`to_mask`).

    Raises UserError for another shape or range.
    """
    if image is None:
        return None
    if isinstance(image, tuple):
        return tuple(_take(each, channels) for each in image)
    return _take(image, channels)


def _take(image: OneInMemory, channels: int) -> OneInMemory:
    if isinstance(image, Image.Image):
        try:
            return to_mask(image) if channels == 1 else to_rgb(image)
        except Exception as error:  # decoders raise anything: an image of Image.open is read only now
            raise UserError(f"an image cannot be used: {reason(error)}") from None
    batch = image.reshape((1,) * (4 - image.ndim) + image.shape)
    if batch.shape[:2] != (1, channels) or batch.ndim != 4:
        raise UserError(
            f"an image of shape {list(image.shape)} is not allowed: give one of [{channels}, height, width]"
        )
    if not ((batch >= 0) & (batch <= 1)).all():
        raise UserError("an image's values must lie in 0..1")
    return batch.detach().cpu().float()


def size_of(image: InMemory) -> tuple[int, int]:
    """(height, width) in pixels; of several the first's, to which all are fitted."""
    if isinstance(image, tuple):
        return size_of(image[0])
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether one (height, width) is the other at another size, up to a pixel of rounding."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= max(*a, *b)


def fit_image(image: InMemory, size: tuple[int, int], bicubic: bool = False) -> Tensor:
    """[1, 3, H, W] in 0..1, resized as diffusers does: PIL images by Lanczos, tensors to the nearest.

    Of several images a row each.
    """
    if isinstance(image, tuple):
        return torch.cat([fit_image(each, size, bicubic) for each in image])
    if isinstance(image, Tensor):
        return F.interpolate(image, size)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.LANCZOS
    return to_tensor(image.resize(size[::-1], resample))


def reshaped(image: Image.Image, size: tuple[int, int], mode: str) -> Image.Image:
    """An image in the shape of (height, width), its own kept: as A1111's resize modes 1 and 2.

    "crop" covers all of it and loses what lies beyond; "fill" lies within, and its edges are repeated.
    """
    height, width = size
    is_wider = image.width * height > width * image.height
    by_height = is_wider == (mode == "crop")
    w = image.width * height // image.height if by_height else width
    h = height if by_height else image.height * width // image.width
    small = image.resize((max(1, w), max(1, h)), Image.Resampling.LANCZOS)
    left, top = width // 2 - small.width // 2, height // 2 - small.height // 2
    if mode == "crop":
        return small.crop((-left, -top, width - left, height - top))
    around = ((top, height - top - small.height), (left, width - left - small.width), (0, 0))
    pixels = np.asarray(small)
    return Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="edge"))


def fit_mask(mask: InMemory, size: tuple[int, int], soft: bool = False) -> Tensor:
    """[1, 1, H, W]: 1 where a picture is drawn anew (where the mask is at least half white), else 0.

    A `soft` one keeps what lies between. Of several masks a row each.
    """
    if isinstance(mask, tuple):
        return torch.cat([fit_mask(each, size, soft) for each in mask])
    if isinstance(mask, Tensor):
        values = F.interpolate(mask, size)
    else:
        grey = mask.convert("L").resize(size[::-1], Image.Resampling.LANCZOS)
        values = torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)[None, None]
    return values if soft else (values >= 0.5).float()
