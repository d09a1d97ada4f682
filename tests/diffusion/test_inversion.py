"""A picture to noise and back: exactly, where the method says so."""

import pytest
from mixture import PLANE

from ldm.diffusion.inversion import bdia, bdia_invert, ddim_invert
from ldm.diffusion.noise import Noise
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised, ancestral

SCHEDULE = Schedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


def denoise(x, sigma):
    """The mixture's, in fp32 as networks answer."""
    return Denoised(PLANE.denoise(x.double(), sigma).x0.float())


def last(steps):
    return list(steps)[-1].x


@pytest.mark.parametrize("gamma", [1.0, 0.96])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_the_round_trip_is_exact_to_rounding_in_fp32(steps, gamma):
    x0, sigmas = PLANE.sample(64).float(), SCHEDULE.grid(steps, "trailing", "ddim").sigmas
    there = bdia_invert(denoise, x0, sigmas, gamma)
    back = last(bdia(denoise, *there, sigmas, gamma))
    assert (back - x0).abs().max() < 1e-5 * there[0].abs().max()


@pytest.mark.parametrize("steps", [10, 50])
def test_ddims_is_not_and_falls_with_the_steps(steps):
    x0, errors = PLANE.sample(64).float(), []
    for n in (steps, 4 * steps):
        sigmas = SCHEDULE.grid(n, "trailing", "ddim").sigmas
        noise = ddim_invert(denoise, x0, sigmas)
        back = last(ancestral(denoise, noise, sigmas, Noise(range(64)), eta=0.0))
        errors.append(float((back - x0).abs().max() / x0.abs().max()))
    assert errors[0] > 1e-3
    assert errors[1] < 0.7 * errors[0]


def test_inverted_noise_has_the_variance_of_noise():
    x0, sigmas = PLANE.sample(2000), SCHEDULE.grid(100, "trailing", "ddim").sigmas
    noise = ddim_invert(PLANE.denoise, x0, sigmas)
    assert float(noise.std() / sigmas[0]) == pytest.approx(1, abs=0.1)
    both = bdia_invert(PLANE.denoise, x0, sigmas)
    assert float(both[0].std() / sigmas[0]) == pytest.approx(1, abs=0.15)
