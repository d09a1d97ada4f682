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
