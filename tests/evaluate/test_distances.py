"""Distances against their closed forms for Gaussians, and against a direct sum."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ldm.evaluate.distances import frechet_distance, mmd, psnr


def with_moments(mean, cov, n=200, seed=0):
    """Samples whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def random_cov(dim, seed):
    a = np.random.default_rng(seed).standard_normal((dim, dim))
    return a @ a.T + 0.1 * np.eye(dim)


def test_psnr_of_a_constant_error_is_its_closed_form():
    a = np.full((2, 8, 8, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 10
    values = psnr(a, b)
    assert values[0] == np.inf
    assert values[1] == pytest.approx(20 * np.log10(25.5), rel=1e-12)


def test_psnr_does_not_wrap_around_at_zero():
    a, b = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert psnr(a, b)[0] == psnr(b, a)[0] == 0


def test_psnr_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        psnr(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8))


def test_frechet_of_diagonal_gaussians():
    a = with_moments(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    b = with_moments(np.array([3.0, 1.0, -2.0]), np.diag([4.0, 4.0, 1.0]), seed=1)
    expected = (9 + 0 + 16) + (1 + 0 + 4)  # |gap of means|^2 + sum (std_a - std_b)^2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_equals_the_textbook_formula_with_sqrtm():
    cov_a, cov_b = random_cov(6, 1), random_cov(6, 2)
    mean_a, mean_b = np.arange(6.0), np.ones(6)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    got = frechet_distance(with_moments(mean_a, cov_a), with_moments(mean_b, cov_b, seed=3))
    assert got == pytest.approx(expected, rel=1e-8)


def test_frechet_of_a_set_with_itself_is_nothing_even_when_singular():
    x = np.random.default_rng(0).standard_normal((5, 20))
    assert abs(frechet_distance(x, x)) < 1e-6


def test_mmd_of_gaussians_approaches_its_closed_form():
    """E k(x, y) = prod_d s / sqrt(s^2 + 2) exp(-gap_d^2 / (2 (s^2 + 2))) for unit Gaussians."""
    rng, s, gap = np.random.default_rng(0), 2.0, np.array([1.0, -0.5])

    def expected_kernel(d):
        return np.prod(s / np.sqrt(s**2 + 2) * np.exp(-(d**2) / (2 * (s**2 + 2))))

    expected = 2 * expected_kernel(np.zeros(2)) - 2 * expected_kernel(gap)
    values = [mmd(rng.standard_normal((800, 2)), rng.standard_normal((800, 2)) + gap, s) for _ in range(20)]
    assert np.mean(values) == pytest.approx(expected, rel=0.05)


def test_mmd_is_unbiased_on_equal_distributions():
    rng = np.random.default_rng(0)
    values = np.array(
        [mmd(rng.standard_normal((8, 3)), rng.standard_normal((8, 3)), 1.0) for _ in range(500)]
    )
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert values.min() < 0


@pytest.mark.parametrize("distance", [frechet_distance, mmd])
def test_one_sample_is_refused(distance):
    with pytest.raises(ValueError, match="at least two"):
        distance(np.zeros((1, 3)), np.zeros((5, 3)))
