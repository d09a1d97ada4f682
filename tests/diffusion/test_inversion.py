"""A picture to noise and back: exactly, where the method says so."""

import pytest
import torch
from mixture import PLANE

from ldm.diffusion.inversion import bdia, bdia_invert, ddim_invert, edit_mask, fading_gamma
from ldm.diffusion.methods.ancestral import ancestral
from ldm.diffusion.noise import Noise
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised

SCHEDULE = Schedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


def denoise(x, sigma):
    """The mixture's, in fp32 as networks answer."""
    return Denoised(PLANE.denoise(x.double(), sigma).x0.float())


def last(steps):
    return list(steps)[-1].x


@pytest.mark.parametrize("gamma", [1.0, 0.96, None])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_the_round_trip_is_exact_to_rounding_in_fp32(steps, gamma):
    x0, sigmas = PLANE.sample(64).float(), SCHEDULE.grid(steps, "trailing", "ddim").sigmas
    gamma = fading_gamma(steps) if gamma is None else gamma
    there = bdia_invert(denoise, x0, sigmas, gamma)
    assert len(there) == steps + 1
    assert torch.equal(there[-1], x0)
    back = last(bdia(denoise, there, sigmas, gamma))
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


@pytest.fixture
def wide():
    """Pictures of unit noise, which `shrink` denoises exactly, and levels."""
    x0 = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    return x0, SCHEDULE.grid(12, "trailing", "ddim").sigmas


def shrink(x, sigma):
    return Denoised(x / (1 + sigma**2))


@pytest.mark.parametrize(("by", "found"), [(0.18, True), (0.16, False)])
def test_the_mask_is_where_two_denoisers_differ(wide, by, found):
    x0, sigmas = wide

    def target(x, sigma):
        x0 = shrink(x, sigma).x0.clone()
        x0[1, 1, 2, 4] += by  # of three channels: its mean square is a third
        return Denoised(x0)

    mask = edit_mask(shrink, target, bdia_invert(shrink, x0, sigmas), sigmas)
    wanted = torch.zeros(2, 1, 4, 8, dtype=torch.bool)
    wanted[1, :, 2, 4] = found
    assert torch.equal(mask, wanted)


def test_outside_the_mask_the_state_is_the_inversions_at_every_level(wide):
    x0, sigmas = wide
    mask = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    mask[..., 3:] = True
    gamma = fading_gamma(12)
    path = bdia_invert(shrink, x0, sigmas, gamma)

    def target(x, sigma):
        return Denoised(shrink(x, sigma).x0 + 1)

    steps = list(bdia(target, path, sigmas, gamma, mask))
    for step in steps:
        assert torch.equal(step.x[..., :3], path[step.i + 1][..., :3])
    assert (steps[-1].x - x0)[..., 3:].min() > 0.5
    free = last(bdia(target, path, sigmas, gamma))
    assert torch.allclose(steps[-1].x[..., 3:], free[..., 3:])  # here no column sees another


@pytest.mark.parametrize("steps", [12, 50])
def test_what_another_prompt_sets_swinging_fades(wide, steps):
    """Of a target that is x0 + 1 everywhere the ODE's end is known: x0 + c; the leapfrog swings about it."""
    x0, _ = wide
    sigmas = SCHEDULE.grid(steps, "trailing", "ddim").last(int(0.9 * steps)).sigmas

    def target(x, sigma):
        return Denoised(shrink(x, sigma).x0 + sigma.to(x) ** 2 / (1 + sigma.to(x) ** 2))

    def edited(gamma):
        path = bdia_invert(shrink, x0, sigmas, gamma)
        return last(bdia(target, path, sigmas, gamma)) - x0

    start = float(sigmas[0])
    exact = 1 - (1 + start**2) ** -0.5  # of N(1, 1) data: the mean's part of the flow from sigma to 0
    faded, swinging = (float((edited(gamma) - exact).abs().max()) for gamma in (fading_gamma(steps), 1.0))
    assert faded < 0.1
    assert swinging > 3 * faded
