"""Colours, blurs, holes and surfaces: control pictures that are no lines."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from ldm.preprocess.lines import blurred
from ldm.preprocess.options import Within
from ldm.preprocess.pictures import Levels, Picture, opencv, slopes, stretched, to_picture


def invert(picture: Picture) -> Picture:
    """Black lines on white as white on black: 255 - x."""
    return 255 - picture


def tile_resample(
    picture: Picture,
    *,
    rate: Annotated[float, Within(1, 64, "how many pixels of a side become one")] = 2.0,
) -> Picture:
    """Without its detail: made smaller by the means of boxes, and larger again by bilinear interpolation."""
    cv, (height, width) = opencv(), picture.shape[:2]
    small = (max(1, round(width / rate)), max(1, round(height / rate)))
    means = cv.resize(picture.astype(np.float32) / np.float32(255), small, interpolation=cv.INTER_AREA)
    return to_picture(cv.resize(means, (width, height), interpolation=cv.INTER_LINEAR))


def blur_gaussian(
    picture: Picture,
    *,
    sigma: Annotated[float, Within(0.1, 64, "pixels: the Gaussian's standard deviation")] = 9.0,
) -> Picture:
    """Blurred by a Gaussian."""
    return to_picture(blurred(picture.astype(np.float32) / np.float32(255), sigma))


def color(
    picture: Picture,
    *,
    cell: Annotated[int, Within(1, 1024, "pixels of a cell's side, about")] = 64,
) -> Picture:
    """A grid of cells of one colour each, the mean of what it covers.

    For T2I-Adapter's colour, whose own preprocessor takes a few pixels of each cell.
    """
    cv, (height, width) = opencv(), picture.shape[:2]
    cells = (max(1, width // cell), max(1, height // cell))
    means = cv.resize(picture, cells, interpolation=cv.INTER_AREA)
    grid: Picture = cv.resize(means, (width, height), interpolation=cv.INTER_NEAREST)
    return grid


def inpaint(picture: Picture, mask: Levels) -> Picture:
    """The picture with what is drawn anew left out, transparent.

    [H, W, 4]: alpha 0 and black where the mask, 0..1 [H, W], is above a half; `control_values` makes -1 of
    those pixels. Raises UserError for a mask of another size.
    """
    if mask.shape != picture.shape[:2]:
        sizes = [f"{w} x {h}" for h, w in (mask.shape, picture.shape[:2])]
        raise UserError(f"the mask is {sizes[0]} pixels, the picture {sizes[1]}: make them one size")
    hidden = mask > 0.5
    alpha = np.where(hidden, 0, 255).astype(np.uint8)[..., None]
    return np.concatenate([np.where(hidden[..., None], np.uint8(0), picture), alpha], axis=2)


def depth(
    levels: Levels,
    *,
    far_is_white: Annotated[bool, Within(0, 1, "of the map given, such as one of distances")] = False,
) -> Picture:
    """A depth map from black, the farthest, to white, the nearest."""
    return to_picture(_nearness(levels, far_is_white))


def normal(
    levels: Levels,
    *,
    far_is_white: Annotated[bool, Within(0, 1, "of the map given, such as one of distances")] = False,
    relief: Annotated[
        float, Within(0.01, 10, "how deep the scene is, in shorter sides of the picture")
    ] = 0.5,
    background: Annotated[float, Within(0, 1, "what is farther, 0 to 1, counts as flat")] = 0.0,
) -> Picture:
    """Normals of the surface that a depth map describes, as colours (n + 1) / 2.

    Blue is front, red is left, green is up (ControlNet 1.1's normals); n is (dz/dx, dz/dy, 1) at length
    1, where z goes to the viewer, x to the right and y down.
    """
    near = _nearness(levels, far_is_white)
    far = near < background
    down, across = slopes(near * np.float32(relief * min(near.shape)))
    n: NDArray[np.float32] = np.stack([across, down, np.ones_like(near)], axis=2)
    n[far] = (0, 0, 1)
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    return to_picture((n + np.float32(1)) / np.float32(2))


def seg(classes: Levels) -> Picture:
    """Classes of ADE20K, numbered from 0, as the colours that ControlNets know them by.

    Raises UserError for a number that ADE20K does not have.
    """
    from ldm.preprocess.ade20k import COLOURS

    numbers = classes.astype(np.int64)
    if numbers.min() < 0 or numbers.max() >= len(COLOURS) or math.isnan(float(classes.sum())):
        raise UserError(f"a segmentation's classes are ADE20K's, 0 to {len(COLOURS) - 1}")
    return np.array(COLOURS, np.uint8)[numbers]


def _nearness(levels: Levels, far_is_white: bool) -> Levels:
    near = stretched(levels)
    return 1 - near if far_is_white else near
