"""The hue of a sprite: which one it has, and another in its place."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

# Hue (0 to 1), saturation and value of what a word means.
HUES = {
    "red": (0.0, 0.86, 0.88),
    "orange": (28 / 360, 0.88, 0.97),
    "yellow": (48 / 360, 0.83, 0.99),
    "green": (138 / 360, 0.73, 0.68),
    "blue": (220 / 360, 0.81, 0.88),
    "purple": (272 / 360, 0.64, 0.77),
    "pink": (331 / 360, 0.43, 0.97),
    "white": (40 / 360, 0.02, 0.97),
}
_BINS = 36


def backdrop(name: str) -> tuple[float, float, float]:
    """A plain background, red, green, blue in 0 to 255: softer than things of the same colour."""
    if name in _NEUTRAL:
        return _NEUTRAL[name]
    hue, saturation, value = HUES[name]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.7 * saturation, min(1, 1.02 * value))
    return 255 * red, 255 * green, 255 * blue


_NEUTRAL = {"white": (248.0, 248.0, 246.0), "grey": (188.0, 190.0, 196.0), "black": (34.0, 34.0, 40.0)}
BACKDROPS = (*(name for name in HUES if name != "white"), *_NEUTRAL)


def dominant(pixels: NDArray[np.uint8]) -> tuple[float, float, float]:
    """The hue (0 to 1) of RGBA pixels [H, W, 4], its share of what is coloured, and of all that is drawn.

    (0, 0, 0) where nothing is coloured.
    """
    hue, saturation, value = _hsv(pixels[..., :3])
    drawn = pixels[..., 3] > 128
    coloured = drawn & (saturation > 0.25) & (value > 0.35)
    counts = np.bincount((hue[coloured] * _BINS).astype(int) % _BINS, minlength=_BINS).astype(float)
    if not counts.sum():
        return 0.0, 0.0, 0.0
    window = np.sum([np.roll(counts, shift) for shift in (-2, -1, 0, 1, 2)], axis=0)
    middle, share = (int(np.argmax(window)) + 0.5) / _BINS, float(window.max())
    off = (hue[coloured] - middle + 0.5) % 1 - 0.5
    mean = middle + float(off[np.abs(off) <= 2.5 / _BINS].mean())
    return mean % 1, share / float(counts.sum()), share / max(1, int(drawn.sum()))


def recolour(pixels: NDArray[np.uint8], hue: float, colour: str) -> NDArray[np.uint8]:
    """RGBA pixels whose parts near `hue` take the colour's hue and strength; their shading stays."""
    h, s, v = _hsv(pixels[..., :3])
    near = np.abs((h - hue + 0.5) % 1 - 0.5) < 0.09
    mask = near * np.clip((s - 0.15) / 0.15, 0, 1) * (pixels[..., 3] > 0)
    chosen = mask > 0.5
    if not chosen.any():
        return pixels
    new_hue, new_saturation, new_value = HUES[colour]
    middle_saturation, middle_value = float(np.median(s[chosen])), float(np.median(v[chosen]))
    saturation = np.clip(new_saturation * s / max(middle_saturation, 0.05), 0, 1)
    if middle_value < new_value:  # lighter: highlights must not all become one
        value = np.clip(new_value - (middle_value - v), 0, 1)
    else:
        value = np.clip(v * new_value / max(middle_value, 0.05), 0, 1)
    painted = 255 * _rgb(np.full_like(h, new_hue), saturation, value)
    out = pixels.copy()
    mixed = pixels[..., :3] * (1 - mask[..., None]) + painted * mask[..., None]
    out[..., :3] = np.clip(mixed, 0, 255).astype(np.uint8)
    return out


def _hsv(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
    unit = rgb.astype(np.float32) / 255
    most, least = unit.max(-1), unit.min(-1)
    spread = most - least
    red, green, blue = unit[..., 0], unit[..., 1], unit[..., 2]
    safe = np.maximum(spread, 1e-6)
    other = np.where(most == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    hue = np.where(most == red, ((green - blue) / safe) % 6, other) / 6
    return hue.astype(np.float32), spread / np.maximum(most, 1e-6), most


def _rgb(
    hue: NDArray[np.float32], saturation: NDArray[np.float32], value: NDArray[np.float32]
) -> NDArray[np.float32]:
    k = np.stack([5 + 6 * hue, 3 + 6 * hue, 1 + 6 * hue], -1) % 6
    part = np.clip(np.minimum(k, 4 - k), 0, 1)
    rgb: NDArray[np.float32] = value[..., None] * (1 - saturation[..., None] * part)
    return rgb
