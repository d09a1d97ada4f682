"""The bound through a VAE: against a linear Gaussian model, whose every quantity has a closed form."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import Denoised
from ldm.errors import UserError
from ldm.evaluate.bound import bounds_of, discretised_log_prob, draw, picture_bounds
from ldm.evaluate.likelihood import own_size
from ldm.models import LatentDist

SIGMAS = torch.cat([torch.logspace(1.5, -1, 40, dtype=torch.float64), torch.zeros(1)])
SCALE, SHIFT, PIXEL_STD = 0.15, 0.5, 6.0  # of the decoder: x = 0.5 + 0.15 z; levels of 255


def denoise(x, sigma):
    """Latents are unit noise: exact."""
    return Denoised(x / (1 + sigma**2))


def decode(z):
    return SHIFT + SCALE * z


def variance_of_z_1():
    """Of what the sampler draws at its lowest level, step by step: each is linear and Gaussian."""
    levels = SIGMAS[:-1].tolist()
    v = 1 + levels[0] ** 2
    for high, low in pairwise(levels):
        ratio = (low / high) ** 2
        keep = ratio + (1 - ratio) / (1 + high**2)
        v = keep**2 * v + low**2 * (1 - ratio)
    return v


def true_log_prob(x):
    """log P of one 8-bit pixel of the model that draws."""
    low = float(SIGMAS[-2])
    spread = SCALE / (1 + low**2)
    std = math.sqrt((spread * 255) ** 2 * variance_of_z_1() + PIXEL_STD**2)
    return float(discretised_log_prob(x, torch.full_like(x, SHIFT), std).sum())


def bounds(x, std, n=1500):
    """n draws of the bound of one pixel, by an encoder that is the decoder's inverse with a spread."""
    mean = ((x - SHIFT) / SCALE).expand(n, 1, 1, 1).double()
    encoded = LatentDist(mean, torch.full_like(mean, std))
    drawn = draw(denoise, encoded, decode, SIGMAS, Noise(range(n)))
    return bounds_of(drawn, x.expand(n, 1, 1, 1), pixel_std=PIXEL_STD)


@pytest.mark.parametrize("value", [60, 128, 170])
@pytest.mark.parametrize("std", [0.0, 0.15])
def test_the_bound_lies_above_the_truth(value, std):
    """With and without a spread of the encoder: a true bound, and not far off of pictures that are usual."""
    x = torch.full((1, 1, 1, 1), value / 255, dtype=torch.float64)
    found = bounds(x, std).pictures * math.log(2)
    error = float(found.std() / len(found) ** 0.5)
    gap = float(found.mean()) + true_log_prob(x)
    assert -4 * error < gap < 0.5


def test_an_encoder_with_the_posteriors_spread_is_better():
    """What an encoder says of its spread is worth nats, and it is counted."""
    x = torch.full((1, 1, 1, 1), 128 / 255, dtype=torch.float64)
    point, spread = bounds(x, 0.0), bounds(x, 0.15)
    assert float(point.encoder.mean()) == 0
    assert float(spread.encoder.mean()) == pytest.approx(-0.5 * math.log(1 + (0.15 / 0.1) ** 2), rel=1e-9)
    assert float(spread.pictures.mean()) < float(point.pictures.mean()) - 0.1


def test_terms_in_closed_form():
    """Of z_0 = mean exactly: prior, steps and decoders by their own formulas."""
    x = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64)
    m, found = (0.8 - SHIFT) / SCALE, bounds(x, 0.0)
    levels = SIGMAS[:-1].tolist()
    high = levels[0] ** 2
    assert float(found.prior[0]) == pytest.approx(
        0.5 * ((high + m**2) / (1 + high) - 1 - math.log(high / (1 + high))), rel=1e-9
    )
    for k, (up, low) in enumerate(pairwise(levels)):
        # E (m - (m + up e) / (1 + up^2))^2
        squared = (m**2 * up**4 + up**2) / (1 + up**2) ** 2
        step = 0.5 * (low**-2 - up**-2) * squared
        assert float(found.steps[k].mean()) == pytest.approx(step, rel=0.12)
    low = levels[-1]
    squared = (m**2 * low**4 + low**2) / (1 + low**2) ** 2
    assert found.latent_std == pytest.approx(math.sqrt(squared), rel=0.05)
    fitted = 0.5 * math.log(2 * math.pi * math.e * found.latent_std**2)
    assert float(found.latent_decoder.mean()) == pytest.approx(fitted, abs=1e-9)


def test_the_fitted_deviation_is_the_likeliest():
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    encoded = LatentDist((x - SHIFT) / SCALE, torch.zeros(()))
    drawn = draw(denoise, encoded, decode, SIGMAS, Noise(range(6)))
    found = bounds_of(drawn, x)
    assert found.pixel_std == pytest.approx(255 * float((drawn.decoded - x).square().mean().sqrt()))
    for factor in (0.9, 1.1):
        other = bounds_of(drawn, x, factor * found.pixel_std, factor * found.latent_std)
        assert other.pictures.mean() > found.pictures.mean()
        assert other.latents.mean() > found.latents.mean()


@pytest.mark.parametrize(("mean", "std"), [(0.4, 3.0), (0.999, 0.2), (0.0, 40.0)])
def test_masses_of_all_values_add_up_to_one(mean, std):
    x = torch.arange(256) / 255
    masses = discretised_log_prob(x, torch.full_like(x, mean), std).exp()
    assert float(masses.sum()) == pytest.approx(1, rel=1e-9)


def test_masses_far_from_the_mean_keep_their_digits():
    """Against the density, which a bin of a broad Gaussian is; and finite 200 deviations off."""
    x = torch.tensor([0.1, 0.9], dtype=torch.float64)
    x = (x * 255).round() / 255
    found = discretised_log_prob(x, torch.full_like(x, 0.5), 20.0)
    density = torch.distributions.Normal(0.5 * 255, 20.0).log_prob(x * 255)
    assert torch.allclose(found, density, atol=4e-3)
    far = discretised_log_prob(x, torch.full_like(x, 0.5), 0.5)
    assert bool(far.isfinite().all())
    assert far[0] == pytest.approx(float(far[1]), rel=0.02)


def test_through_a_pipeline(tiny_folder):
    """Picture k is what it is alone; fewer steps make a higher bound of a network that knows nothing."""
    pipe = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    height, width = own_size(pipe)
    values = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    images, prompts = [Image.fromarray(each) for each in values], ["the red boat", ""]
    found = picture_bounds(pipe, images, prompts, steps=5, seed=3)
    stds = {"pixel_std": found.pixel_std, "latent_std": found.latent_std}
    second = picture_bounds(pipe, images[1:], prompts[1:], steps=5, seed=4, **stds)
    assert float(second.pictures[0]) == pytest.approx(float(found.pictures[1]), rel=1e-5)
    assert float(second.latents[0]) == pytest.approx(float(found.latents[1]), rel=1e-5)
    assert float(found.encoder.max()) < 0
    assert found.sigmas.tolist() == pytest.approx(
        [float(pipe.schedule.sigma(t)) for t in (999, 749, 500, 250, 0)], rel=1e-9
    )
    shares = found.terms()
    assert sum(shares[name][1] for name in ("prior", "steps", "encoder", "pixels")) == pytest.approx(
        float(found.pictures.mean())
    )
    # The decoder alone: its masses are those of what the pipeline decodes.
    assert float(found.pixels.min()) > 0
    with pytest.raises(UserError, match="a bound of 1 steps is not allowed"):
        picture_bounds(pipe, images, prompts, steps=1)
