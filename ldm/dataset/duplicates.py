"""Near-duplicate pictures, by a 64-bit difference hash confirmed by colour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BITS = 8  # of 64 that may differ
LEVELS = 4.0  # of 255: mean difference of the thumbnails' colours
ROWS = 128  # compared with all others at once


def find_near_duplicates(thumbs: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """(i, j) for each picture i that looks like an earlier one; j is the first of those.

    Args:
        thumbs: uint8 [N, 8, 9, 3], whole pictures shrunk to 9 x 8 pixels.

    A hash has one bit for each two neighbours in a row: whether the right one is brighter. Colours are
    compared too, since a plain picture has a hash of nothing but noise, and a scene in other colours is
    another scene. O(N^2), 20,000 pictures in seconds. Source: N. Krawetz, "Kind of Like That" (2013).
    """
    hashes = difference_hash(thumbs)
    colours = thumbs.reshape(len(thumbs), -1).astype(np.int16)
    pairs = []
    for start in range(0, len(hashes), ROWS):
        stop = min(start + ROWS, len(hashes))
        near = np.bitwise_count(hashes[start:stop, None] ^ hashes[None, :stop]) <= BITS
        near &= np.arange(stop) < np.arange(start, stop)[:, None]  # earlier ones only
        for row in np.flatnonzero(near.any(axis=1)):
            i, earlier = start + row, np.flatnonzero(near[row])
            apart = np.abs(colours[earlier] - colours[i]).mean(axis=1)
            if (apart <= LEVELS).any():
                pairs.append((int(i), int(earlier[apart <= LEVELS][0])))
    return pairs


def difference_hash(thumbs: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """uint8 [N, 8, 9, 3] -> uint64 [N]."""
    brightness = thumbs @ np.array([299, 587, 114])  # ITU-R BT.601, in thousandths
    bits = brightness[:, :, 1:] > brightness[:, :, :-1]
    packed: NDArray[np.uint64] = np.packbits(bits.reshape(len(thumbs), 64), axis=1).view(np.uint64)[:, 0]
    return packed
