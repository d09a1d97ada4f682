"""How far apart two pictures, or two sets of pictures, are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, eigvalsh
from scipy.spatial.distance import cdist

from ldm.evaluate.report import Rate, rate

Array = NDArray[np.floating[Any]]
ROWS = 1024  # of a matrix of distances that are held at once


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

    def kernel(x: Array, y: Array) -> float:
        return float(sum(np.exp(-part / (2 * bandwidth**2)).sum() for part in _distances(x, y)))

    def within(x: Array) -> float:
        n = len(x)
        return (kernel(x, x) - n) / (n * (n - 1))

    return within(a) + within(b) - 2 * kernel(a, b) / (len(a) * len(b))


def kernel_distance(a: Array, b: Array, subsets: int, size: int, seed: int) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x . y / D + 1)^3, mean and standard deviation over subsets.

    Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4 and section 4; torchmetrics has the arithmetic, and
    is given the features in float64. It can fall below 0 by chance.

    a: [N, D], b: [M, D]. size: of a subset of each side, at most the smaller one.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception")  # of memory, which we hold anyway
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=subsets, subset_size=size)
    for features, real in ((a, True), (b, False)):
        metric.update(torch.from_numpy(np.asarray(features, np.float64)), real=real)
    with torch.random.fork_rng(devices=[]):  # it draws subsets from torch's own generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_recall(drawn: Array, reference: Array, k: int = 3) -> tuple[Rate, Rate]:
    """Precision: drawn ones that lie within a ball of the reference. Recall: the other way round.

    Each member's ball reaches to its k-th nearest neighbour in its own set (Kynkaanniemi et al. 2019,
    "Improved precision and recall metric", eq. 1 and 2).

    drawn: [N, D], reference: [M, D]. Raises ValueError unless both have more than k members.
    """
    if min(len(drawn), len(reference)) <= k:
        raise ValueError(f"the {k}-th neighbour needs more than {k} samples on each side")

    def radii(x: Array) -> Array:  # squared; the nearest of all is the member itself
        return np.concatenate([np.partition(part, k, axis=1)[:, k] for part in _distances(x, x)])

    def covered(x: Array, by: Array) -> Rate:
        reach = radii(by)
        return rate(np.concatenate([(part <= reach).any(axis=1) for part in _distances(x, by)]).tolist())

    return covered(drawn, reference), covered(reference, drawn)


def _distances(x: Array, y: Array) -> Iterator[Array]:
    """Squared Euclidean distances [N, M], some rows at a time."""
    for start in range(0, len(x), ROWS):
        yield cdist(x[start : start + ROWS], y, "sqeuclidean")
