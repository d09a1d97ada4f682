"""Spacings against closed forms and published lists; parity/test_schedulers.py has those of diffusers."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = {"_class_name": "PNDMScheduler", **SD, "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture
def schedule():
    return Schedule.from_config(SD15)


def test_spacings_of_our_own(schedule):
    def t(spacing, n):
        return schedule.grid(n, spacing, "euler").timesteps.tolist()

    assert t("simple", 4) == [999, 749, 499, 249]
    assert t("sgm_uniform", 3) == [999, 666, 333]
    assert t("lcm", 4) == [999, 759, 499, 259]
    sigmas = schedule.grid(5, "exponential", "euler").sigmas[:-1].log()
    assert torch.allclose(sigmas.diff(), sigmas.diff().mean())


def test_karras_formula(schedule):
    """Karras et al. 2022, equation 5, with rho = 7."""
    low, high = float(schedule.sigma(0)), float(schedule.sigma(999))
    i = np.arange(12)
    want = (high ** (1 / 7) + i / 11 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    assert schedule.grid(12, "karras", "dpmpp_2m").sigmas[:-1].numpy() == pytest.approx(want, rel=1e-12)


def loglinear_interp(levels, n):
    """NVIDIA's function of that name, research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html."""
    places = np.linspace(0, 1, len(levels))
    return np.exp(np.interp(np.linspace(0, 1, n), places, np.log(levels[::-1])))[::-1]


NVIDIA = {  # its noise levels of ten steps, the last where they end, by whether it is SDXL's
    False: [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    True: [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
}


@pytest.mark.parametrize("is_xl", [False, True])
@pytest.mark.parametrize("n", [1, 4, 8, 10, 11, 20, 30])
def test_align_your_steps(schedule, is_xl, n):
    grid = dataclasses.replace(schedule, is_xl=is_xl).grid(n, "ays", "euler")
    assert grid.sigmas[-1] == 0
    want = np.log(loglinear_interp(NVIDIA[is_xl], n + 1)[:-1])
    assert grid.sigmas[:-1].log().numpy() == pytest.approx(want, abs=2e-2)  # of three digits
    assert grid.timesteps.numpy() == pytest.approx(schedule.t(grid.sigmas[:-1]).numpy(), abs=1e-6)
    if n == 10:
        listed = diffusers.schedulers.AysSchedules[f"StableDiffusion{'XL' if is_xl else ''}Timesteps"]
        assert grid.timesteps.tolist() == listed


@pytest.mark.parametrize("steps", [400, 2000])
def test_align_your_steps_of_other_training_timesteps(steps):
    """The same places in a schedule of the same noise levels."""
    schedule = Schedule.from_config({**SD15, "num_train_timesteps": steps})
    want = [t * (steps - 1) / 999 for t in diffusers.schedulers.AysSchedules["StableDiffusionTimesteps"]]
    assert schedule.grid(10, "ays", "euler").timesteps.numpy() == pytest.approx(np.array(want), abs=0.1)
    halves = schedule.grid(20, "ays", "euler").sigmas[:-1].log()
    assert halves[1::2][:-1].numpy() == pytest.approx(((halves[:-2:2] + halves[2::2]) / 2).numpy(), abs=1e-9)


def test_align_your_steps_from_pure_noise():
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    t = Schedule.from_config(config).grid(20, "ays", "euler").timesteps
    assert t[:4].tolist() == [999, 924.5, 850, 793]  # evenly over timesteps: infinity has no logarithm


def test_timesteps_of_an_lcm_from_an_image(schedule):
    theirs = diffusers.LCMScheduler(**SD)
    for n, strength in ((4, 0.8), (1, 0.8), (3, 0.5), (7, 0.33), (50, 1.0), (2, 0.05)):
        theirs.set_timesteps(n, strength=strength)
        grid = schedule.grid(n, "lcm", "lcm", strength=strength)
        assert grid.timesteps.tolist() == theirs.timesteps.tolist()
    with pytest.raises(UserError, match=r"9 steps: the lcm spacing has at most 5 at strength 0\.1"):
        schedule.grid(9, "lcm", "lcm", strength=0.1)


def test_polyexponential_is_even_in_log_sigma_to_the_power_rho(schedule):
    """k-diffusion's get_sigmas_polyexponential."""
    low, high = float(schedule.sigma(0)), float(schedule.sigma(999))
    for rho in (None, 0.5, 2.0):
        ramp = np.linspace(1, 0, 9) ** (1.0 if rho is None else rho)
        want = np.exp(ramp * (np.log(high) - np.log(low)) + np.log(low))
        got = schedule.grid(9, "polyexponential", "euler", rho=rho).sigmas[:-1].numpy()
        assert got == pytest.approx(want, rel=1e-12)
    want = (high ** (1 / 3) + np.arange(9) / 8 * (low ** (1 / 3) - high ** (1 / 3))) ** 3
    assert schedule.grid(9, "karras", "euler", rho=3.0).sigmas[:-1].numpy() == pytest.approx(want)
    with pytest.raises(UserError, match="rho is not allowed here: of the spacings only karras, polyexp"):
        schedule.grid(9, "exponential", "euler", rho=2.0)


def test_kl_optimal_is_even_in_the_angle(schedule):
    angles = schedule.grid(9, "kl_optimal", "euler").sigmas[:-1].atan()
    assert torch.allclose(angles.diff(), angles.diff().mean(), rtol=1e-9)
    assert angles[[0, -1]].tan().tolist() == pytest.approx(schedule.sigma(torch.tensor([999.0, 0])).tolist())


def test_ddim_uniform_is_comfyuis(schedule):
    for n in (4, 8, 20, 50):
        want = list(range(1, 1000, 1000 // n))[::-1]
        assert schedule.grid(n, "ddim_uniform", "dpmpp_2m").timesteps.tolist() == want
    assert schedule.grid(7, "ddim_uniform", "euler").timesteps.tolist() == list(range(853, 0, -142))


@pytest.mark.parametrize("n", [2, 7, 10, 20])
def test_linear_quadratic_is_genmos(schedule, n):
    """The formula of Mochi's inference script, of which ComfyUI's levels are sigma_max times."""
    drop, half = 0.025, n // 2
    rest = half - drop * n
    bend = rest / (half * (n - half) ** 2)
    slope = drop / half - 2 * rest / (n - half) ** 2
    done = [i * drop / half for i in range(half)]
    done += [bend * i**2 + slope * i + bend * half**2 for i in range(half, n)]
    want = [float(schedule.sigma(999)) * (1 - each) for each in done]
    assert schedule.grid(n, "linear_quadratic", "euler").sigmas[:-1].tolist() == pytest.approx(want)


def test_beta_timesteps_are_comfyuis(schedule):
    import scipy.stats

    for n in (5, 20, 30):
        u = 1 - np.linspace(0, 1, n, endpoint=False)
        want = np.rint(scipy.stats.beta.ppf(u, 0.6, 0.6) * 999)
        assert schedule.grid(n, "beta_timesteps", "euler").timesteps.tolist() == want.tolist()


@pytest.mark.parametrize("n", [1, 5, 20])
def test_lu_lambdas_are_diffusers(schedule, n):
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True)
    theirs.set_timesteps(n)
    grid = schedule.grid(n, "lu_lambdas", "dpmpp_2m")
    assert grid.sigmas.numpy() == pytest.approx(theirs.sigmas.numpy(), rel=1e-5)
    assert grid.timesteps.tolist() == theirs.timesteps.tolist()


GITS_LEVELS = {  # as published, for the coefficient 1.2; the last is where they end
    2: [14.61464119, 0.803307],
    5: [14.61464119, 2.84484982, 1.24153244, 0.59516323, 0.25053367],
    8: [14.61464119, 5.85520077, 2.45070267, 1.36964464, 0.803307, 0.45573691, 0.25053367, 0.09824532],
}


@pytest.mark.parametrize("n", GITS_LEVELS)
def test_gits(schedule, n):
    got = schedule.grid(n, "gits", "euler").sigmas
    assert got[:-1].tolist() == pytest.approx(GITS_LEVELS[n], rel=1e-4)
    assert got[-1] == 0


def test_gits_beyond_its_lists(schedule):
    """From 20 steps on the last list, evenly in the log of sigma, as ComfyUI does."""
    twenty = schedule.grid(20, "gits", "euler").sigmas
    ends = [*twenty[:-1].tolist(), float(schedule.sigma(0))]
    want = np.log(loglinear_interp(ends, 41)[:-1])
    assert schedule.grid(40, "gits", "euler").sigmas[:-1].log().numpy() == pytest.approx(want)
