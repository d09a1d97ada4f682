"""A picture's plain background, keyed out: how opaque each pixel is, and its colour without the background.

A pixel of a picture C is a mixture of what is drawn there, F, and of the background, B (Porter and Duff 1984,
"Compositing Digital Images"):

    C = alpha F + (1 - alpha) B

B is known, from the border of the picture. What is joined to the border and looks like B is background,
alpha = 0; what is well within the rest is drawn whole, alpha = 1. In the narrow band between them F is taken
from nearby, and alpha is how far C lies on the way from B to F:

    alpha = (C - B) . (F - B) / |F - B|^2

but no less than what leaves its colour within 0..1 (the least alpha that explains C at all). C and alpha then
say each pixel's own F. What the background shows through without being joined to it, the
hole of a ring, is background too where B is a strong colour; in a white or grey one it may be an eye.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PLAIN = 0.6  # least share of the border that must look like the background: a bust is cut off by an edge
LIKE = 0.06  # of a channel, from 0 to 1: what differs less looks like the background
STRONG = 0.35  # saturation from which enclosed parts of the background's colour are holes
BAND = 3  # pixels of a picture of 256 that an edge is wide, at most
SMALLEST = 4  # pixels: smaller enclosed parts are nothing


def keyed(pixels: Array) -> Array | None:
    """A picture [H, W, 3] in 0..1 with alpha [H, W, 4], colours not premultiplied.

    Laid on its background it is the picture again, but for what differs from that by less than LIKE. None if
    its border is not plain: more than a soft slope from side to side.
    """
    from scipy import ndimage

    behind = background(pixels)
    if behind is None:
        return None
    apart = np.abs(pixels - behind).max(2)
    outside = _outside(apart, behind)
    width = BAND * max(1.0, min(apart.shape) / 256)
    away = ndimage.distance_transform_edt(~outside)
    alpha = np.where(outside, 0.0, 1.0)
    band = ~outside & (away <= width)
    if band.any():
        front = _front(pixels, behind, apart, away > width, round(width))
        across = front - behind
        share = ((pixels - behind) * across).sum(2) / np.maximum((across**2).sum(2), 1e-12)
        room = np.where(pixels > behind, 1 - behind, behind)
        least = (np.abs(pixels - behind) / np.maximum(room, 1e-12)).max(2)
        alpha = np.where(band, np.maximum(share, least).clip(0, 1), alpha)
    colours = behind + (pixels - behind) / np.maximum(alpha, 1e-6)[..., None]
    return np.dstack([np.where(alpha[..., None] > 0, colours.clip(0, 1), behind), alpha])


def background(pixels: Array) -> Array | None:
    """The background of a picture [H, W, 3], from its border: one colour with a slope in each direction.

    None where less than PLAIN of the border looks like it.
    """
    height, width = pixels.shape[:2]
    ring = np.ones((height, width), dtype=bool)
    edge = max(1, min(height, width) // 64)
    ring[edge:-edge, edge:-edge] = False
    rows, columns = np.nonzero(ring)
    colours = pixels[ring]
    terms = np.stack([np.ones(len(rows)), rows / height - 0.5, columns / width - 0.5], 1)
    like = np.abs(colours - np.median(colours, 0)).max(1) < 2 * LIKE
    for _ in range(3):
        if like.mean() < PLAIN:
            return None
        slope = np.linalg.lstsq(terms[like], colours[like], rcond=None)[0]
        like = np.abs(colours - terms @ slope).max(1) < LIKE
    if like.mean() < PLAIN:
        return None
    y, x = np.mgrid[:height, :width]
    sloping: Array = np.dstack([np.ones((height, width)), y / height - 0.5, x / width - 0.5]) @ slope
    return sloping


def _outside(apart: Array, behind: Array) -> NDArray[np.bool_]:
    """Where a picture that differs so much from its background shows it."""
    from scipy import ndimage

    parts, count = ndimage.label(apart < LIKE)
    border = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    joined = np.zeros(count + 1, dtype=bool)
    joined[border] = True
    colour = behind.mean((0, 1))
    if colour.max() - colour.min() > STRONG:
        joined |= np.bincount(parts.ravel(), minlength=count + 1) >= SMALLEST
    joined[0] = False
    found: NDArray[np.bool_] = joined[parts]
    return found


def _front(pixels: Array, behind: Array, apart: Array, whole: NDArray[np.bool_], reach: int) -> Array:
    """What is drawn near each pixel [H, W, 3]: that of the nearest pixel that is drawn `whole`, or the one
    within `reach` that differs most from the background; the one that explains the pixel better.
    """
    from scipy import ndimage

    most = ndimage.maximum_filter(apart, 2 * reach + 1)
    # The place of the largest difference: of the nearest pixel that has it.
    peaks = apart >= most - 1e-9
    found = [_nearest(pixels, peaks)]
    if whole.any():
        found.insert(0, _nearest(pixels, whole))
    left = []
    for front in found:
        across = front - behind
        share = ((pixels - behind) * across).sum(2) / np.maximum((across**2).sum(2), 1e-12)
        left.append(np.abs(pixels - behind - share.clip(0, 1)[..., None] * across).max(2))
    best = np.argmin(left, 0)[..., None]
    return np.where(best == 0, found[0], found[-1])


def _nearest(pixels: Array, where: NDArray[np.bool_]) -> Array:
    from scipy import ndimage

    at: Any = ndimage.distance_transform_edt(~where, return_distances=False, return_indices=True)
    found: Array = pixels[at[0], at[1]]
    return found
