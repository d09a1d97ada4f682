"""How far apart two pictures, or two sets of pictures, are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, eigvalsh
from scipy.spatial.distance import cdist

Array = NDArray[np.floating[Any]]


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each picture, 10 log10(255^2 / MSE), in dB.

    a, b: uint8 [N, H, W, 3]. Returns float64 [N]; infinite where two pictures are equal.
    Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"psnr compares pictures of one shape, got {a.shape} and {b.shape}")
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / error.mean(axis=(1, 2, 3))))


def frechet_distance(a: Array, b: Array) -> float:
    """Squared Frechet distance of the Gaussians with the moments of two sets of features.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)   (Heusel et al. 2017, "GANs trained by a two
    time-scale update rule", eq. 6, in the symmetric form, which needs no complex square root).

    a: [N, D], b: [M, D]. Raises ValueError for fewer than two samples.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance needs at least two samples on each side")
    cov_a, cov_b = (np.atleast_2d(np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b))
    values, vectors = eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    gap = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def mmd(a: Array, b: Array, bandwidth: float = 10.0) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean k(a_i, b_j)   (Gretton et al. 2012, "A
    kernel two-sample test", eq. 3). On unit-norm CLIP image features, times 1000, this is CMMD (Jayasumana
    et al. 2024, "Rethinking FID"). Being unbiased, it can fall below 0 by chance.

    a: [N, D], b: [M, D]. Raises ValueError for fewer than two samples.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("an unbiased estimate needs at least two samples on each side")

    def kernel(x: Array, y: Array) -> Array:
        return np.asarray(np.exp(-cdist(x, y, "sqeuclidean") / (2 * bandwidth**2)))

    def within(x: Array) -> float:
        n = len(x)
        return float((kernel(x, x).sum() - n) / (n * (n - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())
