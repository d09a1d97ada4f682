"""Predictions in sigma space, against the variance-preserving formulas of their papers."""

import pytest
import torch

from ldm.diffusion.prediction import Prediction, c_in

X0, NOISE = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1))
SIGMAS = [0.03, 1.0, 14.6, 4096.0]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("prediction", Prediction)
def test_x0_undoes_target(prediction, sigma):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    target = prediction.target(X0, NOISE, sigma)
    assert torch.allclose(prediction.x0(target, X0 + sigma * NOISE, sigma), X0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("a", [0.999, 0.5, 0.0047])
def test_v_is_that_of_salimans_and_ho(a):
    """v = sqrt(a) noise - sqrt(1 - a) x0 and x0 = sqrt(a) z - sqrt(1 - a) v."""
    a = torch.tensor(a, dtype=torch.float64)
    sigma = ((1 - a) / a).sqrt()
    v = a.sqrt() * NOISE - (1 - a).sqrt() * X0
    assert torch.allclose(Prediction.V.target(X0, NOISE, sigma), v, rtol=1e-12)
    z = a.sqrt() * X0 + (1 - a).sqrt() * NOISE
    assert torch.allclose(c_in(sigma) * (X0 + sigma * NOISE), z, rtol=1e-12)
    assert torch.allclose(
        Prediction.V.x0(v, z / a.sqrt(), sigma), a.sqrt() * z - (1 - a).sqrt() * v, rtol=1e-12
    )


def test_one_sigma_per_image():
    sigmas = torch.tensor([0.5, 7.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    for prediction in Prediction:
        together = prediction.target(X0, NOISE, sigmas)
        alone = [prediction.target(X0[k : k + 1], NOISE[k : k + 1], sigmas[k, 0, 0, 0]) for k in range(2)]
        assert torch.allclose(together, torch.cat(alone), rtol=1e-12)


def test_pure_noise_in_fp32():
    """At the sigma that stands for infinity v is -x0, and a float64 scalar does not widen an fp32 state."""
    x0, noise, sigma = X0.float(), NOISE.float(), torch.tensor(1e10, dtype=torch.float64)
    x = x0 + sigma * noise
    target = Prediction.V.target(x0, noise, sigma)
    assert torch.allclose(target, -x0, atol=1e-6)
    assert torch.allclose(x * c_in(sigma), noise, atol=1e-6)
    got = Prediction.V.x0(target, x, sigma)
    assert got.dtype == torch.float32
    assert torch.allclose(got, x0, atol=1e-6)
