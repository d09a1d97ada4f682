"""An invisible mark in a picture's brightness, and how it is told from chance.

Spread spectrum (Cox et al. 1997, "Secure spread spectrum watermarking for multimedia", IEEE Trans. Image
Processing 6(12)): a key gives a sign s = +-1 to each low frequency of the picture, and marking moves that
frequency's coefficient by a little in the direction of its sign. Frequencies are counted in half waves per
picture, so that the mark lies in the same ones after a resize; a crop or a turn takes it away.

With c the coefficients of the orthonormal DCT-II of the luma, and g(c) a score of each that is computed
without the key, the statistic is

    z = sum(s g) / sqrt(sum(g^2))

Of a picture that was not marked with the key, the signs are independent of g, each +1 or -1 by equal chance.
So z is a weighted sum of Rademacher variables, of variance 1, whatever the picture is, and (Bentkus and
Dzindzalieta 2015, "A tight Gaussian bound for weighted sums of Rademacher random variables", Bernoulli 21(2))

    P(z >= t) <= 3.178 P(N(0, 1) >= t)

The chance is over keys: SHAKE-256 makes the signs of one. No torch here.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from ldm.request.fields import KEY_VARIABLE, PUBLIC_MARK, mark_named, own_key

Array = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as JPEG has it
LOWEST, HIGHEST, FADED = 5, 60, 64  # half waves per picture: which are used, and where the weight would be 0
OCTAVES = 4  # of larger pictures 2, 4 or 8 times as many, finer ones: tried one after another
MIN_SIDE = 64  # pixels: the highest are there, even so
NOISE = 4.0  # levels of 255: what a JPEG of quality 75 adds to a coefficient, about
CLIP = 2.0  # of a score: one strong edge is to decide nothing
AMPLITUDES = (1.6, 1.6, 0.9, 0.6)  # of the change, rms in levels, by octave: at least,
GROWTH, MOST_GROWTH = 1.12, 14  # and by how many such steps at most
HIDING, MOST_HIDDEN = 3.0, 8.0  # levels of contrast that hide twice as much; and how much more at most
TARGET = 9.0  # z of a marked picture, at least, unless it takes too much
NORMAL = NormalDist()
BOUND = 1 / (4 * NORMAL.cdf(-math.sqrt(2)))  # 3.178
FALSE_POSITIVES = 1e-6  # for one key, at most
THRESHOLD = -NORMAL.inv_cdf(FALSE_POSITIVES / BOUND / OCTAVES)  # 5.26


@dataclass(frozen=True)
class Detection:
    """How a picture agrees with a key: the highest z of all octaves."""

    z: float

    @property
    def chance(self) -> float:
        """The most that an unmarked picture has of such a z, or a higher one, over keys."""
        return min(1.0, OCTAVES * BOUND * NORMAL.cdf(-self.z))

    @property
    def found(self) -> bool:
        return self.z >= THRESHOLD


def mark(picture: NDArray[Any], key: bytes) -> Array:
    """A picture [H, W, 3] in 0..1, marked: the same change in all three channels. Raises UserError."""
    height, width = picture.shape[:2]
    check_size(height, width)
    levels = 255 * np.asarray(picture, dtype=np.float64)
    octave = octave_of(height, width)
    down, across, luma = _waves(height, octave), _waves(width, octave), levels @ LUMA
    coefficients = down @ luma @ across.T
    # Of all changes of one energy, this one raises z the most.
    weights = _weights(coefficients.shape, octave) / _scale(coefficients)
    pattern = (down.T @ (_signs(key, coefficients.shape) * weights) @ across) * _room(luma)
    pattern /= math.sqrt(float(np.mean(pattern**2)))
    grown, marked = down @ pattern @ across.T, levels
    for step in range(MOST_GROWTH):
        strength, last = AMPLITUDES[octave] * GROWTH**step, step == MOST_GROWTH - 1
        if _statistic(coefficients + strength * grown, key, octave) < TARGET and not last:
            continue
        marked = np.clip(levels + strength * pattern[..., None], 0, 255)  # which takes some of it
        if _statistic(down @ (marked @ LUMA) @ across.T, key, octave) >= TARGET:
            break
    return marked / 255


def octave_of(height: int, width: int) -> int:
    """Which frequencies a picture is marked in: the finest that are there at half its size."""
    return max(0, min(OCTAVES - 1, int(math.log2(min(height, width) / (2 * MIN_SIDE)) + 1e-9)))


def detect(picture: NDArray[Any], key: bytes) -> Detection:
    """Whether a picture [H, W, 3] of 8 bits agrees with a key more than chance would have it."""
    every = _coefficients(picture)
    tops = [HIGHEST << octave for octave in range(OCTAVES)]
    return Detection(max(_statistic(every[:top, :top], key, octave) for octave, top in enumerate(tops)))


def check_size(height: int, width: int) -> None:
    """Raise UserError for a picture that is too small to be marked."""
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"watermark is not allowed for {width}x{height} pixels: it needs at least {MIN_SIDE} a side"
        )


# --- keys ------------------------------------------------------------------------------------------------


def key_named(name: str) -> bytes:
    """The key by the name in a request: everybody's, or one's own. Raises UserError where that is another."""
    if name == PUBLIC_MARK:
        return PUBLIC_MARK.encode()
    own = own_key()
    if own is None or mark_named(own) != name:
        raise UserError(f"watermark {name} is by a key that is not here: set {KEY_VARIABLE} to it")
    return own


# --- the statistic ---------------------------------------------------------------------------------------


def scores(picture: NDArray[Any], octave: int = 0) -> Array:
    """g of a picture [H, W, 3] of 8 bits: the statistic of any key is a sum of these with its signs."""
    top = HIGHEST << octave
    return _scores(_coefficients(picture)[:top, :top], octave)


def _coefficients(picture: NDArray[Any]) -> Array:
    """All that any octave uses."""
    height, width = picture.shape[:2]
    coefficients: Array = _waves(height, OCTAVES - 1) @ (picture @ LUMA) @ _waves(width, OCTAVES - 1).T
    return coefficients


def _statistic(coefficients: Array, key: bytes, octave: int) -> float:
    g = _scores(coefficients, octave)
    energy = math.sqrt(float((g * g).sum()))
    return float((g * _signs(key, coefficients.shape)).sum()) / energy if energy else 0.0


def _scores(coefficients: Array, octave: int) -> Array:
    scale = _scale(coefficients)
    weights = _weights(coefficients.shape, octave)
    score: Array = np.clip(coefficients / scale, -CLIP, CLIP) * weights / scale
    return score


def _scale(coefficients: Array) -> Array:
    """How large the coefficients around each are, and what a JPEG adds to them."""
    scale: Array = np.sqrt(_mean_around(np.abs(coefficients), 9) ** 2 + NOISE**2)
    return scale


def _mean_around(values: Array, side: int) -> Array:
    """Of `side` x `side` numbers around each of [H, W]."""
    from scipy.ndimage import uniform_filter  # not for those who mark nothing: it takes a quarter of a second

    mean: Array = uniform_filter(values, side, mode="nearest")
    return mean


def _room(luma: Array) -> Array:
    """[H, W]: how much more than on a flat ground a change is hidden by what is around each pixel."""
    mean = _mean_around(luma, 7)
    contrast = np.sqrt(np.maximum(_mean_around(luma**2, 7) - mean**2, 0))
    room: Array = 1 + np.minimum(contrast / HIDING, MOST_HIDDEN)
    return room


@lru_cache(maxsize=16)
def _weights(shape: tuple[int, ...], octave: int) -> Array:
    """Less for high frequencies, which a resize and a JPEG take first; 0 for those that are not used."""
    radius = np.hypot(np.arange(shape[0])[:, None], np.arange(shape[1])[None]) / 2**octave
    weights: Array = np.where((radius >= LOWEST) & (radius < HIGHEST), 1 - radius / FADED, 0.0)
    return weights


@lru_cache(maxsize=16)
def _waves(size: int, octave: int) -> Array:
    """The first rows of the orthonormal DCT-II, [at most size, size]."""
    k = np.arange(min(size, HIGHEST << octave))[:, None]
    waves: Array = np.sqrt(2 / size) * np.cos(np.pi / size * (np.arange(size)[None] + 0.5) * k)
    waves[0] /= math.sqrt(2)
    return waves


def _signs(key: bytes, shape: tuple[int, ...]) -> Array:
    return _all_signs(key)[: shape[0], : shape[1]]


@lru_cache(maxsize=64)
def _all_signs(key: bytes) -> Array:
    """+-1 for each frequency of each octave."""
    side = HIGHEST << (OCTAVES - 1)
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(key).digest(side**2 // 8), np.uint8))
    signs: Array = np.where(bits.reshape(side, side) == 1, 1.0, -1.0)
    return signs
