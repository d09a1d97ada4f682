"""Solvers against a closed form: Gaussian data, whose denoiser and whose ODE are known exactly."""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ldm.diffusion.noise import BrownianNoise, Noise
from ldm.diffusion.prediction import c_in
from ldm.diffusion.samplers import SAMPLERS, resolve_sampler
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised, Step
from ldm.errors import UserError

MEAN, STD = 0.3, 0.5
X = torch.tensor([3.0, -7.0, 11.0, 0.5], dtype=torch.float64).reshape(1, 1, 2, 2)
ODE_SOLVERS = [
    name for name, sampler in SAMPLERS.items() if name not in ("ddpm", "lcm") and not sampler.takes_eta
]
SDE_SOLVERS = ["ddpm", "ddim", "euler_a", "dpmpp_sde", "dpmpp_2m_sde"]


def gaussian(x, sigma, std=STD):
    """E[x0 | x] for x0 ~ N(MEAN, std^2)."""
    variance = float(sigma) ** 2
    return Denoised((std**2 * x + variance * MEAN) / (std**2 + variance))


def exact(x, start, end, std=STD):
    """The probability-flow ODE of the Gaussian, solved."""
    return MEAN + (x - MEAN) * math.sqrt((std**2 + end**2) / (std**2 + start**2))


def falling(n, curve):
    """n steps from sigma 10 to 0.1."""
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if curve == "sigma":
        return 10 - 9.9 * u
    return (math.log(10) - math.log(100) * (u**2 if curve == "slow start" else u)).exp()


def last(name, denoise, x, sigmas, noise=None, **options):
    *_, step = SAMPLERS[name].solver(denoise, x, sigmas, noise, **options)
    return step


# LMS and PLMS start with a step of lower order. On a grid whose first steps are of length h^2 that costs LMS
# nothing; PLMS, whose weights are made for even steps, shows its order where steps in sigma are even, on data
# smooth enough for them.
ORDERS = [
    ("euler", "log", {}, 1),
    ("ddim", "log", {"eta": 0.0}, 1),
    ("euler_a", "log", {"eta": 0.0}, 1),
    ("heun", "log", {}, 2),
    ("dpmpp_2m", "log", {}, 2),
    ("dpmpp_2s", "log", {}, 2),
    ("dpmpp_sde", "log", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", "log", {"eta": 0.0}, 2),
    ("unipc", "log", {}, 2),
    ("lms", "slow start", {"order": 1}, 1),
    ("lms", "slow start", {"order": 2}, 2),
    ("lms", "slow start", {"order": 3}, 3),
    ("lms", "slow start", {}, 4),
    ("pndm", "sigma", {}, 4),
]


@pytest.mark.parametrize(("name", "curve", "options", "order"), ORDERS)
def test_error_falls_with_the_order(name, curve, options, order):
    errors, std = [], 2.0 if name == "pndm" else STD
    for n in (128, 256, 512):
        got = last(name, functools.partial(gaussian, std=std), X, falling(n, curve), **options).x
        errors.append(float((got - exact(X, 10, 0.1, std)).abs().max()))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.2)


@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_moments_of_sde_solvers(name):
    """Mean and standard deviation of 65,536 samples, drawn from sigma 40 to 0."""
    start, shape, first_order = 40.0, (4, 128, 128), name in ("ddpm", "ddim", "euler_a")
    noise = SAMPLERS[name].noise([11])
    x = MEAN + math.sqrt(STD**2 + start**2) * noise.initial(shape).double()
    sigmas = torch.linspace(
        math.log(start), math.log(0.01), 400 if first_order else 40, dtype=torch.float64
    ).exp()
    options = {"eta": 1.0} if SAMPLERS[name].takes_eta else {}
    x = last(name, gaussian, x, torch.cat([sigmas, torch.zeros(1)]), noise, **options).x
    standard_error = STD / math.sqrt(x.numel())
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * standard_error)
    assert float(x.std()) == pytest.approx(STD, rel=0.015)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_step_splits_the_variance(eta):
    """Fresh noise of ``eta`` times the posterior's, the rest along the old: sigma_next^2 in all."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    spent = []

    class Unit(Noise):
        def __call__(self, like, sigma, sigma_next):
            spent.append((sigma, sigma_next))
            return zero + 1

    def at_zero(x, sigma):
        return Denoised(zero)

    sigmas = torch.tensor([4.0, 3.0], dtype=torch.float64)
    both = float(last("ddim", at_zero, zero + 4, sigmas, Unit([0]), eta=eta).x)
    up = eta * 3 * math.sqrt(1 - 9 / 16)
    assert both == pytest.approx(math.sqrt(9 - up**2) + up)
    assert spent == ([(4.0, 3.0)] if eta else [])


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_that_is_not_used_is_not_drawn(name):
    drawn = []

    class Counting(Noise):
        def __call__(self, like, sigma, sigma_next):
            drawn.append(sigma_next)
            return super().__call__(like, sigma, sigma_next)

    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    last(name, gaussian, X, sigmas, Counting([0]))
    expected = {"dpmpp_sde": [math.sqrt(27.0), 3.0, math.sqrt(3.0), 1.0]}
    random = name in ("ddpm", "euler_a", "dpmpp_2m_sde", "lcm")
    assert drawn == pytest.approx(expected.get(name, [3.0, 1.0] if random else []))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_told(name, n):
    sigmas = torch.cat([falling(n, "log")[:-1], torch.zeros(1)])
    calls = []

    def denoise(x, sigma):
        calls.append(float(sigma))
        assert sigma.ndim == 0
        assert sigma.dtype == torch.float64
        return gaussian(x, sigma)

    steps = list(SAMPLERS[name].solver(denoise, X.float(), sigmas, SAMPLERS[name].noise([0])))
    assert [step.i for step in steps] == list(range(n))
    assert [step.sigma for step in steps] == pytest.approx(sigmas[1:].tolist())
    assert all(step.x.dtype == torch.float32 and torch.isfinite(step.x).all() for step in steps)
    twice = name in ("heun", "dpmpp_sde")
    assert len(calls) == (2 * n - 1 if twice else n + 1 if name == "pndm" and n > 1 else n)
    if name not in ("lms", "pndm"):  # which extrapolate to the very end
        assert torch.equal(steps[-1].x, steps[-1].x0)


FIRST_ORDER_STARTS = ["ddim", "euler", "lms", "pndm", "dpmpp_2m", "dpmpp_2s", "unipc"]


@pytest.mark.parametrize("name", FIRST_ORDER_STARTS)
def test_steps_go_along_the_anchor(name):
    x0, anchor = X * 0.1, X * 0.3 - 1
    sigmas = torch.tensor([8.0, 2.0], dtype=torch.float64)
    got = last(name, lambda x, sigma: Denoised(x0, anchor), X, sigmas).x
    assert torch.allclose(got, x0 + 2 * (X - anchor) / 8, rtol=1e-12)


def test_heun_goes_along_the_anchor():
    x0, anchor = X * 0.1, X * 0.3 - 1
    got = last("heun", lambda x, s: Denoised(x0, anchor), X, torch.tensor([8.0, 2.0], dtype=torch.float64)).x
    slope = (X - anchor) / 8
    euler = x0 + 2 * slope
    assert torch.allclose(got, euler + (2 - 8) / 2 * ((euler - anchor) / 2 - slope), rtol=1e-12)


def test_denoised_anchors_on_x0_by_default():
    denoised = Denoised(X)
    assert denoised.anchor is X
    assert denoised.log_variance is None


def zero_snr_schedule():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Schedule.from_config(
        {
            "_class_name": "DDIMScheduler",
            **betas,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    )


@pytest.mark.parametrize("spacing", [None, "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_fp32_from_pure_noise(name, spacing):
    """A first sigma of thousands, or of infinity, costs fp32 nothing; the picture is a picture."""
    schedule = zero_snr_schedule()
    grid = schedule.grid(20, spacing, name)

    def denoise(x, sigma):
        # v of unit-Gaussian latents is 0; the rest bends it a little.
        v = 0.2 * torch.tanh(x * c_in(sigma) + float(grid.t(sigma)) / 1000)
        return Denoised(schedule.prediction.x0(v, x, sigma))

    def draw(dtype):
        noise = SAMPLERS[name].noise([3, 4])
        x = noise.initial((4, 8, 8)).to(dtype) * grid.initial_scale
        return last(name, denoise, x, grid.sigmas, noise).x

    wide, narrow = draw(torch.float64), draw(torch.float32)
    assert float((wide - narrow).abs().max() / wide.abs().max()) < 2e-5
    assert 0.5 < float(wide.std()) < 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_and_threads_do_not_matter(name):
    """Image k of a batch equals the image drawn alone, also while another thread draws."""
    schedule = zero_snr_schedule()
    grid = schedule.grid(5, None, name)

    def denoise(x, sigma):
        return Denoised(schedule.prediction.x0(torch.tanh(x * c_in(sigma)), x, sigma))

    def draw(seeds):
        noise = SAMPLERS[name].noise(seeds)
        x = noise.initial((4, 4, 4)) * grid.initial_scale
        return last(name, denoise, x, grid.sigmas, noise).x

    together = draw([1, 2, 3])
    with ThreadPoolExecutor(2) as pool:
        alone = torch.cat(list(pool.map(draw, ([1], [2], [3]))))
    assert torch.equal(together, alone)


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


@pytest.mark.parametrize(("wrong", "near"), [("dpmpp_3m", "dpmpp_2m"), ("eular", "euler"), ("ddmi", "ddim")])
def test_unknown_sampler_names_the_nearest(wrong, near):
    with pytest.raises(UserError, match=f"unknown sampler '{wrong}': did you mean.*{near}"):
        resolve_sampler(wrong)
    with pytest.raises(UserError, match="choose from ddpm, ddim"):
        resolve_sampler("???")


def test_eta_means_something_to_some():
    assert {name for name, sampler in SAMPLERS.items() if sampler.takes_eta} == set(SDE_SOLVERS) - {"ddpm"}
    assert SAMPLERS["dpmpp_sde"].noise is BrownianNoise


def test_own_solver():
    def straight_home(denoise, x, sigmas, noise):
        d = denoise(x, sigmas[0])
        yield Step(0, 0.0, d.x0, d.x0)

    sampler, spacing = resolve_sampler(straight_home)
    grid = zero_snr_schedule().grid(4, spacing, sampler)
    assert sampler.name == "straight_home"
    (step,) = sampler.solver(gaussian, X, grid.sigmas, Noise([0]))
    assert torch.equal(step.x, gaussian(X, grid.sigmas[0]).x0)
