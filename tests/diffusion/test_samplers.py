"""The catalogue: every spelling of other programs, options, and solvers of one's own."""

import pytest
import torch

from ldm.diffusion.noise import BrownianNoise, Noise
from ldm.diffusion.samplers import SAMPLERS, resolve_sampler
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised, Step
from ldm.errors import UserError

SPELLINGS = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "dpmpp_2m": ("dpmpp_2m", None),
    "dpm++2m": ("dpmpp_2m", None),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "dpmpp_2m_sde_karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ SDE": ("dpmpp_sde", None),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", None),
    "DPMSolverSinglestepScheduler": ("dpmpp_2s", None),
    "DPMSolverSDEScheduler": ("dpmpp_sde", None),
    "k_euler_a": ("euler_a", None),
    "Euler a": ("euler_a", None),
    "euler_ancestral": ("euler_a", None),
    "EulerDiscreteScheduler": ("euler", None),
    "k_lms": ("lms", None),
    "LMS Karras": ("lms", "karras"),
    "Heun SGM Uniform": ("heun", "sgm_uniform"),
    "plms": ("pndm", None),
    "PNDMScheduler": ("pndm", None),
    "DDIM trailing": ("ddim", "trailing"),
    "uni_pc": ("unipc", None),
    "LCM": ("lcm", None),
    "DDPM": ("ddpm", None),
    "Predictor-Corrector": ("pc", None),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"),  # AUTOMATIC1111
    "k_dpmpp_sde_ka": ("dpmpp_sde", "karras"),
    "k_dpmpp_2m_sde_ka": ("dpmpp_2m_sde", "karras"),
    "k_dpmpp_2m_sde_exp": ("dpmpp_2m_sde", "exponential"),
    "k_lms_ka": ("lms", "karras"),
    "dpmpp_sde_gpu": ("dpmpp_sde", None),  # ComfyUI
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde", None),
    "dpmpp_2m_sde_gpu_karras": ("dpmpp_2m_sde", "karras"),
    "dpm++2m_sde_bt": ("dpmpp_2m_sde", None),  # stable-diffusion.cpp
    "euler_k": ("euler", "karras"),  # InvokeAI
    "heun_k": ("heun", "karras"),
    "lms_k": ("lms", "karras"),
    "dpmpp_2m_k": ("dpmpp_2m", "karras"),
    "dpmpp_2s_k": ("dpmpp_2s", "karras"),
    "dpmpp_2m_sde_k": ("dpmpp_2m_sde", "karras"),
    "dpmpp_sde_k": ("dpmpp_sde", "karras"),
    "unipc_k": ("unipc", "karras"),
    "DDIMParallelScheduler": ("ddim", None),
    "DDPMParallelScheduler": ("ddpm", None),
    "k_dpm_2_ka": ("dpm2", "karras"),  # AUTOMATIC1111
    "k_dpm_2_a_ka": ("dpm2_a", "karras"),
    "k_dpm_2_a": ("dpm2_a", None),
    "k_dpmpp_2s_a": ("dpmpp_2s_a", None),
    "k_dpmpp_2s_a_ka": ("dpmpp_2s_a", "karras"),
    "k_dpmpp_2m_sde_heun": ("dpmpp_2m_sde_heun", None),
    "k_dpmpp_2m_sde_heun_ka": ("dpmpp_2m_sde_heun", "karras"),
    "k_dpmpp_2m_sde_heun_exp": ("dpmpp_2m_sde_heun", "exponential"),
    "k_dpmpp_3m_sde": ("dpmpp_3m_sde", None),
    "k_dpmpp_3m_sde_ka": ("dpmpp_3m_sde", "karras"),
    "k_dpmpp_3m_sde_exp": ("dpmpp_3m_sde", "exponential"),
    "k_dpm_fast": ("dpm_fast", None),
    "k_dpm_ad": ("dpm_adaptive", None),
    "DPM++ 2S a Karras": ("dpmpp_2s_a", "karras"),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde_heun", "exponential"),
    "DPM2 a": ("dpm2_a", None),
    "DPM adaptive": ("dpm_adaptive", None),
    "Restart": ("restart", None),
    "DDIM CFG++": ("ddim_cfg_pp", None),
    "ddim_cfgpp": ("ddim_cfg_pp", None),
    "dpm_2": ("dpm2", None),  # ComfyUI
    "dpm_2_ancestral": ("dpm2_a", None),
    "dpm_fast": ("dpm_fast", None),
    "dpm_adaptive": ("dpm_adaptive", None),
    "dpmpp_2s_ancestral": ("dpmpp_2s_a", None),
    "dpmpp_2s_ancestral_cfg_pp": ("dpmpp_2s_a_cfg_pp", None),
    "dpmpp_2m_cfg_pp": ("dpmpp_2m_cfg_pp", None),
    "dpmpp_2m_sde_heun_gpu": ("dpmpp_2m_sde_heun", None),
    "dpmpp_3m_sde_gpu": ("dpmpp_3m_sde", None),
    "euler_cfg_pp": ("euler_cfg_pp", None),
    "euler_ancestral_cfg_pp": ("euler_a_cfg_pp", None),
    "ipndm": ("ipndm", None),
    "ipndm_v": ("ipndm_v", None),
    "deis": ("deis", None),
    "res_multistep_cfg_pp": ("res_multistep_cfg_pp", None),
    "res_multistep_ancestral": ("res_multistep_a", None),
    "res_multistep_ancestral_cfg_pp": ("res_multistep_a_cfg_pp", None),
    "gradient_estimation_cfg_pp": ("gradient_estimation_cfg_pp", None),
    "er_sde": ("er_sde", None),
    "sa_solver": ("sa_solver", None),
    "dpm++2s_a": ("dpmpp_2s_a", None),  # stable-diffusion.cpp
    "euler_a_cfg_pp": ("euler_a_cfg_pp", None),
    "euler_ge": ("gradient_estimation", None),
    "tcd": ("tcd", None),
    "kdpm_2": ("dpm2", None),  # InvokeAI
    "kdpm_2_k": ("dpm2", "karras"),
    "kdpm_2_a": ("dpm2_a", None),
    "kdpm_2_a_k": ("dpm2_a", "karras"),
    "dpmpp_3m": ("dpmpp_3m", None),
    "dpmpp_3m_k": ("dpmpp_3m", "karras"),
    "deis_k": ("deis", "karras"),
    "KDPM2DiscreteScheduler": ("dpm2", None),  # diffusers
    "KDPM2AncestralDiscreteScheduler": ("dpm2_a", None),
    "DEISMultistepScheduler": ("deis", None),
    "IPNDMScheduler": ("ipndm", None),
    "TCDScheduler": ("tcd", None),
    "SASolverScheduler": ("sa_solver", None),
    "Euler Discrete": ("euler", None),  # not the schedule of that name
    "DPM++ 2M discrete": ("dpmpp_2m", "linspace"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    sampler, spacing = resolve_sampler(spelling)
    assert (sampler.name, spacing) == SPELLINGS[spelling]


def test_labels_are_spellings():
    for name, sampler in SAMPLERS.items():
        assert resolve_sampler(sampler.label)[0].name == name == sampler.name


@pytest.mark.parametrize(("wrong", "near"), [("dpmpp_4m", "dpmpp_2m"), ("eular", "euler"), ("ddmi", "ddim")])
def test_unknown_sampler_names_the_nearest(wrong, near):
    with pytest.raises(UserError, match=f"unknown sampler '{wrong}': did you mean.*{near}"):
        resolve_sampler(wrong)
    with pytest.raises(UserError, match="choose from ddpm, ddim"):
        resolve_sampler("???")


def test_eta_means_something_to_some():
    assert {name for name, sampler in SAMPLERS.items() if sampler.takes_eta and not sampler.cfg_pp} == {
        "ddim", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun",
        "dpmpp_3m_sde", "res_multistep_a", "sa_solver", "tcd",
    }  # fmt: skip
    assert SAMPLERS["dpmpp_sde"].noise is BrownianNoise


def test_own_solver():
    def straight_home(denoise, x, sigmas, noise):
        d = denoise(x, sigmas[0])
        yield Step(0, 0.0, d.x0, d.x0)

    sampler, spacing = resolve_sampler(straight_home)
    grid = Schedule.from_config({}).grid(4, spacing, sampler)
    assert sampler.name == "straight_home"
    x = torch.ones(1, 1, 2, 2)
    (step,) = sampler.solver(lambda x, sigma: Denoised(x / sigma), x, grid.sigmas, Noise([0]))
    assert torch.equal(step.x, x / grid.sigmas[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_are_the_solvers_own(name):
    """Each is taken, and a default that is given is the default that it has."""
    sampler, x = SAMPLERS[name], torch.full((1, 1, 2, 2), 5.0)
    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.3, 0.0], dtype=torch.float64)

    def draw(**options):
        noise = sampler.noise([1])
        *_, step = sampler.solver(lambda x, sigma: Denoised(torch.tanh(x)), x, sigmas, noise, **options)
        return step.x

    assert torch.equal(draw(**sampler.options), draw())


BAD_OPTIONS = [
    ("euler", {"eta": 0.5}, "sampler option eta is not allowed here: euler has none, it takes s_churn"),
    ("dpmpp_2m", {"order": 3}, "sampler option order is not allowed here: dpmpp_2m has none, it takes none"),
    ("euler_a", {"eta": 0.5}, "it takes none"),
    ("lms", {"order": 2.5}, "order=2.5 is not allowed: it must be a whole number from 1 to 4"),
    ("lms", {"order": 5}, "order=5 is not allowed"),
    ("heun", {"s_churn": -1}, "s_churn=-1 is not allowed: it must be a number from 0 up"),
    ("heun", {"s_churn": float("nan")}, "s_churn=nan is not allowed"),
    ("dpm_adaptive", {"rtol": 0}, "rtol=0 is not allowed: it must be a number from 1e-06 up"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_options(name, options, message):
    with pytest.raises(UserError, match=message):
        SAMPLERS[name].chosen(options)


def test_options_as_the_solver_takes_them():
    assert SAMPLERS["lms"].chosen({"order": 2.0}) == {"order": 2}
    assert isinstance(SAMPLERS["lms"].chosen({"order": 2.0})["order"], int)
    assert SAMPLERS["heun"].chosen({"s_churn": 5}) == {"s_churn": 5.0}
