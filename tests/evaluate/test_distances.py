"""Distances against their closed forms for Gaussians, and against a direct sum."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.evaluate import distances
from ldm.evaluate.distances import frechet_distance, kernel_distance, mmd, precision_recall, psnr


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


class Given(torch.nn.Module):
    """Features in place of pictures, for torchmetrics."""

    num_features = 5

    def forward(self, features):
        return features


def sets(n=40, m=55, dims=5, gap=0.4):
    rng = np.random.default_rng(7)
    return rng.standard_normal((n, dims)) @ rng.standard_normal((dims, dims)), rng.standard_normal(
        (m, dims)
    ) + gap


def test_frechet_is_torchmetrics_on_the_same_features():
    a, b = sets()
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kernel_distance_of_whole_sets_is_the_direct_sum():
    """A subset as large as both sets is both sets: Binkowski et al. 2018, eq. 4, written out."""
    a, b = sets(20, 20)

    def k(x, y):
        return (x @ y / 5 + 1) ** 3

    n = len(a)
    within = sum(k(x[i], x[j]) for x in (a, b) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    expected = within - 2 * sum(k(x, y) for x in a for y in b) / n**2
    mean, std = kernel_distance(a, b, subsets=3, size=20, seed=0)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_follows_its_seed_and_leaves_torch_s_alone():
    a, b = sets()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = kernel_distance(a, b, 10, 20, seed=1)
    assert torch.rand(1) == expected
    assert kernel_distance(a, b, 10, 20, seed=1) == first
    assert kernel_distance(a, b, 10, 20, seed=2) != first
    assert first[1] > 0


def test_precision_and_recall_are_the_paper_s_definition():
    a, b = sets(30, 45, gap=1.2)

    def radius(x, i, k):
        return sorted(np.linalg.norm(x - x[i], axis=1))[k]

    def covered(x, by, k):
        balls = [radius(by, j, k) for j in range(len(by))]
        return sum(any(np.linalg.norm(y - z) <= r for z, r in zip(by, balls, strict=True)) for y in x)

    for k in (1, 3):
        precision, recall = precision_recall(a, b, k)
        assert (precision.right, precision.n) == (covered(a, b, k), 30)
        assert (recall.right, recall.n) == (covered(b, a, k), 45)
    assert 0 < precision.share < 1
    assert 0 < recall.share < 1


def test_a_mode_that_is_never_drawn_costs_recall_and_not_precision():
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((200, 2)) + np.repeat([[0.0, 0.0], [50.0, 0.0]], 100, axis=0)
    precision, recall = precision_recall(rng.standard_normal((100, 2)), modes)
    assert precision.share > 0.9
    assert 0.4 < recall.share <= 0.5


def test_distances_do_not_depend_on_how_many_rows_are_held(monkeypatch):
    a, b = sets()
    whole = mmd(a, b, 2.0), precision_recall(a, b)
    monkeypatch.setattr(distances, "ROWS", 7)
    assert mmd(a, b, 2.0) == pytest.approx(whole[0], rel=1e-12)
    assert precision_recall(a, b) == whole[1]


def test_too_few_for_a_neighbour_are_refused():
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


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
