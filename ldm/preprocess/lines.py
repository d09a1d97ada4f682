"""Edges and lines without weights. All are white on black, as ControlNets were trained on them."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from ldm.preprocess.options import Within
from ldm.preprocess.pictures import Levels, Picture, grey, opencv, slopes, to_picture

MOST = 2040  # |gx| + |gy| of Sobel's 3 x 3 kernels on 8 bits
WIDTH = Within(0.1, 20, "pixels: the finer Gaussian's standard deviation")
RATIO = Within(1.1, 10, "the coarser Gaussian's standard deviation over the finer one's")
GAIN = Within(0.1, 100, "how much brighter")


def canny(
    picture: Picture,
    *,
    low: Annotated[float, Within(0, MOST, "gradients from here go on an edge that is begun")] = 100.0,
    high: Annotated[float, Within(0, MOST, "gradients from here begin an edge")] = 200.0,
) -> Picture:
    """Edges one pixel wide.

    Canny 1986, OpenCV's: of each pixel the channel of the largest gradient counts, without a blur before.
    Raises UserError if `low` is above `high`.
    """
    if low > high:
        raise UserError(f"canny: low {low:g} is above high {high:g}: edges begin at high and go on from low")
    edges: NDArray[np.uint8] = opencv().Canny(picture, low, high)
    return np.repeat(edges[..., None], 3, axis=2)


def softedge(
    picture: Picture,
    *,
    sigma: Annotated[float, Within(0.3, 20, "pixels: how soft, a Gaussian's standard deviation")] = 1.5,
    gain: Annotated[float, GAIN] = 2.0,
) -> Picture:
    """Soft edges by gradients: in the place of HED's and PiDiNet's, which need weights.

    sigma sqrt(2 pi) |grad(G_sigma * I)|, the largest of the channels: on a straight edge, the contrast across
    it (Lindeberg 1998, "Edge detection and ridge detection with automatic scale selection", section 4).
    """
    down, across = slopes(blurred(picture.astype(np.float32) / np.float32(255), sigma))
    size = np.hypot(down, across).max(axis=2) * np.float32(sigma * math.sqrt(2 * math.pi))
    return to_picture(size * np.float32(gain))


def lineart(
    picture: Picture,
    *,
    sigma: Annotated[float, WIDTH] = 1.0,
    ratio: Annotated[float, RATIO] = 1.6,
    gain: Annotated[float, GAIN] = 16.0,
) -> Picture:
    """Lines that are darker than what is around, by a difference of Gaussians.

    G_(ratio sigma) * I - G_sigma * I of the luminance, where it is above 0 (Marr and Hildreth 1980, whose
    ratio is 1.6).
    """
    luminance = grey(picture)
    return to_picture((blurred(luminance, ratio * sigma) - blurred(luminance, sigma)) * np.float32(gain))


def lineart_xdog(
    picture: Picture,
    *,
    sigma: Annotated[float, WIDTH] = 0.8,
    ratio: Annotated[float, RATIO] = 1.6,
    sharpness: Annotated[float, Within(0, 200, "p, how much the difference of Gaussians counts")] = 20.0,
    threshold: Annotated[float, Within(0, 1, "epsilon, the luminance below which all is line")] = 0.5,
    hardness: Annotated[float, Within(0.1, 1000, "phi, how quickly white becomes line")] = 10.0,
) -> Picture:
    """Lines and dark areas as of ink, by XDoG.

    Winnemoeller et al. 2012, "XDoG: an extended difference-of-Gaussians compendium", section 2, inverted:
    S = (1 + p) G_sigma * I - p G_(ratio sigma) * I; ink = -tanh(phi (S - epsilon)) where S < epsilon, else 0.
    """
    luminance = grey(picture)
    fine, coarse = blurred(luminance, sigma), blurred(luminance, ratio * sigma)
    sharp = (1 + sharpness) * fine - sharpness * coarse
    return to_picture(-np.tanh(hardness * (sharp - threshold)))


def scribble_xdog(
    picture: Picture,
    *,
    threshold: Annotated[float, Within(1, 64, "higher gives fewer lines")] = 32.0,
) -> Picture:
    """Coarse lines as drawn by hand, by a difference of Gaussians.

    Where 2 (G_5 * I - G_0.5 * I), of 255, is above the threshold in every channel: the numbers of the
    preprocessor of that name in ControlNet 1.1.
    """
    values = picture.astype(np.float32)
    darker = (blurred(values, 5.0) - blurred(values, 0.5)).min(axis=2)
    return to_picture((2 * darker > threshold).astype(np.float32))


def blurred(levels: NDArray[np.float32], sigma: float) -> Levels:
    """Convolved with a Gaussian of standard deviation sigma, mirrored at the edges: [H, W] or [H, W, 3]."""
    smooth: Levels = opencv().GaussianBlur(levels, (0, 0), sigma)
    return smooth
