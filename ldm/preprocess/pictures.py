"""What preprocessors take and give, and how both are read from PIL images."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.errors import UserError
from ldm.images.opening import to_rgb

Picture = NDArray[np.uint8]  # [H, W, 3]; of `inpaint` [H, W, 4], whose alpha is 0 where it is drawn anew
Levels = NDArray[np.float32]  # [H, W], a map of any range: depths, or one of a picture's channels
CHANNELS = {"RGB": 3, "RGBA": 4}


def opencv() -> ModuleType:
    """The package cv2. Raises UserError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError("this preprocessor needs OpenCV: pip install 'ldm[control]'") from None
    return cv2


def as_picture(array: NDArray[Any]) -> Picture:
    """What is given, if it is a uint8 array [H, W, 3] with a pixel in it. Raises UserError for another."""
    if array.ndim != 3 or array.shape[2] != 3 or not array.size or array.dtype != np.uint8:
        found = f"{array.dtype} {list(array.shape)}"
        raise UserError(f"a picture to preprocess is uint8 [height, width, 3], not {found}")
    return array


def to_levels(image: Image.Image) -> Image.Image:
    """A map of mode F as it was stored: 16 and 32 bits keep their steps, and colours become luminance.

    Raises ValueError for NaN and Inf. A `convert` for `open_picture`.
    """
    if not image.mode.startswith(("I", "F")):
        return to_rgb(image).convert("L").convert("F")
    levels = np.asarray(image).astype(np.float32)
    if not np.isfinite(levels).all():
        raise ValueError("the map holds NaN or Inf")
    return Image.fromarray(levels)


def source_of(image: Image.Image) -> Picture | Levels:
    """The array of an image: of mode F a map [H, W], else a picture [H, W, 3] (`to_rgb`)."""
    if image.mode == "F":
        return np.array(image, dtype=np.float32)
    return np.array(to_rgb(image), dtype=np.uint8)


def control_values(picture: Picture) -> NDArray[np.float32]:
    """[H, W, 3] or [H, W, 4] -> float32 [3, H, W] in 0..1, and -1 where alpha is below 128.

    So an inpainting ControlNet is told what is missing (Zhang 2023, ControlNet 1.1; diffusers'
    `make_inpaint_condition`).
    """
    values = picture[..., :3].astype(np.float32) / 255
    if picture.shape[2] == 4:
        values[picture[..., 3] < 128] = -1
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def stretched(levels: Levels) -> Levels:
    """A map with its lowest value at 0 and its highest at 1; one without relief is 0.

    Raises UserError for NaN, Inf and another shape.
    """
    if levels.ndim != 2 or not levels.size or not np.isfinite(levels).all():
        raise UserError(
            f"a depth map is finite and [height, width], not {list(levels.shape)} with NaN or Inf"
        )
    low, high = float(levels.min()), float(levels.max())
    span = high - low
    return ((levels - low) / span if span else np.zeros_like(levels)).astype(np.float32)


def grey(picture: Picture) -> Levels:
    """Luminance in 0..1 (ITU-R BT.601)."""
    luminance = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return luminance / np.float32(255)


def slopes(levels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(down, across) by central differences, per pixel, one-sided at edges; along a side of 1 pixel 0."""
    down, across = (
        np.gradient(levels, axis=axis) if levels.shape[axis] > 1 else np.zeros_like(levels) for axis in (0, 1)
    )
    return down, across


def to_picture(levels: NDArray[np.float32]) -> Picture:
    """0..1 [H, W] or [H, W, 3] -> uint8 [H, W, 3], cut off beyond and rounded."""
    values = np.rint(levels.clip(0, 1) * 255).astype(np.uint8)
    return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else values
