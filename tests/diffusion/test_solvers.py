"""Solvers against a closed form: Gaussian data, whose denoiser and whose ODE are known exactly."""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from mixture import Mixture

from ldm.diffusion.noise import Noise
from ldm.diffusion.prediction import c_in
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised

MEAN, STD = 0.3, 0.5
X = torch.tensor([3.0, -7.0, 11.0, 0.5], dtype=torch.float64).reshape(1, 1, 2, 2)
SDE_SOLVERS = [
    "ddpm", "ddim", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde", "res_multistep_a", "er_sde", "sa_solver",
]  # fmt: skip
FIRST_ORDER = ("ddpm", "ddim", "euler_a", "dpmpp_2s_a", "dpm2_a", "res_multistep_a")
TWICE = ("heun", "dpm2", "dpm2_a", "restart", "dpmpp_sde", "dpmpp_2s_a", "pc")
PLAIN = {name: sampler for name, sampler in SAMPLERS.items() if not sampler.cfg_pp}


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
    ("ipndm", "slow start", {"order": 2}, 2),
    ("ipndm_v", "slow start", {}, 4),
    ("deis", "log", {}, 2),
    ("deis", "slow start", {"order": 3}, 3),
    ("gradient_estimation", "log", {}, 1),
    ("gradient_estimation", "sigma", {"gamma": 1.5}, 2),
    ("dpm2", "log", {}, 2),
    ("dpm2_a", "log", {"eta": 0.0}, 2),
    ("dpm_fast", "log", {}, 3),
    ("dpmpp_2s_a", "log", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde_heun", "log", {"eta": 0.0}, 2),
    # The weight that the paper gives to x0's second difference is half of what order 3 needs.
    ("dpmpp_3m", "slow start", {}, 2),
    ("dpmpp_3m_sde", "slow start", {"eta": 0.0}, 2),
    ("res_multistep", "log", {}, 2),
    ("res_multistep_a", "log", {"eta": 0.0}, 2),
    ("sa_solver", "log", {"eta": 0.0}, 2),
    ("sa_solver", "log", {"eta": 0.0, "corrector_order": 1}, 1),
    ("tcd", "log", {"eta": 0.0}, 1),
]


@pytest.mark.parametrize(("name", "curve", "options", "order"), ORDERS)
def test_error_falls_with_the_order(name, curve, options, order):
    errors, std = [], 2.0 if curve == "sigma" else STD
    for n in (126, 252, 504):
        got = last(name, functools.partial(gaussian, std=std), X, falling(n, curve), **options).x
        errors.append(float((got - exact(X, 10, 0.1, std)).abs().max()))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.2)


@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_moments_of_sde_solvers(name):
    """Mean and standard deviation of 65,536 samples, drawn from sigma 40 to 0."""
    start, shape, first_order = 40.0, (4, 128, 128), name in FIRST_ORDER
    noise = SAMPLERS[name].noise([11])
    x = MEAN + math.sqrt(STD**2 + start**2) * noise.initial(shape).double()
    sigmas = torch.linspace(
        math.log(start), math.log(0.01), 400 if first_order else 80, dtype=torch.float64
    ).exp()
    options = {"eta": 1.0} if SAMPLERS[name].takes_eta else {}
    x = last(name, gaussian, x, torch.cat([sigmas, torch.zeros(1)]), noise, **options).x
    standard_error = STD / math.sqrt(x.numel())
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * standard_error)
    assert float(x.std()) == pytest.approx(STD, rel=0.015)


# Of 64 numbers each, since a step's length is found from one picture's norms.
WIDE = Mixture([0.3, 0.7], [[1.0] * 64, [-0.5] * 64], [0.3, 0.5])


def drawn_from_wide(solver, levels, **options):
    """Share, mean and variance of the first component, and of the second, among 1,024 samples."""
    generator = torch.Generator().manual_seed(0)

    def noise(like, *_):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    sigmas = torch.linspace(math.log(40), math.log(0.05), levels, dtype=torch.float64).exp()
    x = 40 * noise(torch.empty(1024, 1, 8, 8))
    *_, step = solver(WIDE.denoise, x, torch.cat([sigmas, torch.zeros(1)]), noise, **options)
    first = step.x.mean(dim=(1, 2, 3)) > 0.25
    groups = (step.x[first], step.x[~first])
    return [float(value) for x in groups for value in (len(x) / 1024, x.mean(), x.var())]


def test_the_corrector_brings_the_moments_of_the_mixture():
    """Exact share, means and variances; the same predictor alone leaves a tenth of the variance out."""
    wanted = [0.3, 1.0, 0.3, 0.7, -0.5, 0.5]
    assert drawn_from_wide(SAMPLERS["pc"].solver, 60, correct_steps=3) == pytest.approx(wanted, rel=0.05)
    alone = drawn_from_wide(SAMPLERS["ddpm"].solver, 60)
    assert max(alone[2] / 0.3, alone[5] / 0.5) < 0.91
    errors = [abs(drawn_from_wide(SAMPLERS["pc"].solver, n)[5] - 0.5) for n in (10, 20, 60)]
    assert errors[0] > 1.8 * errors[1] > 1.8**2 * errors[2]


@pytest.mark.parametrize("snr", [0.16, 0.05])
def test_the_corrector_is_diffusers(snr):
    """ScoreSdeVeScheduler's, whose norms are means over the batch, as here of one picture."""
    x, sigma = X[:, :, :1] / 3, torch.tensor([8.0, 2.0], dtype=torch.float64)
    (step,) = SAMPLERS["pc"].solver(gaussian, x, sigma, Noise([3]), snr=snr)
    (predicted,) = SAMPLERS["pc"].solver(gaussian, x, sigma, Noise([3]), correct_steps=0)
    (ancestral,) = SAMPLERS["euler_a"].solver(gaussian, x, sigma, Noise([3]))
    assert torch.equal(predicted.x, ancestral.x)
    score = (gaussian(predicted.x, 2.0).x0 - predicted.x) / 4
    generator = torch.Generator().manual_seed(3)
    torch.randn(x.shape, generator=generator)  # the predictor's
    theirs = ScoreSdeVeScheduler(snr=snr)
    theirs.set_sigmas(2)
    wanted = theirs.step_correct(score, predicted.x, generator=generator).prev_sample
    assert torch.allclose(step.x, wanted, rtol=1e-6)


def test_a_score_of_nothing_adds_the_levels_noise():
    """The length that the norms ask for would be infinite."""
    zeros = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    sigmas = torch.tensor([3.0, 2.0], dtype=torch.float64)
    (step,) = SAMPLERS["pc"].solver(lambda x, sigma: Denoised(x), zeros, sigmas, Noise([3]))
    noise = Noise([3])
    predicted = noise(zeros, 3, 2) * 2 * math.sqrt(1 - 4 / 9)
    assert torch.allclose(step.x, predicted + 2 * noise(zeros, 2, 2), rtol=1e-12)


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


@pytest.mark.parametrize("name", PLAIN)
def test_noise_that_is_not_used_is_not_drawn(name):
    drawn = []

    class Counting(Noise):
        def __call__(self, like, sigma, sigma_next):
            drawn.append(sigma_next)
            return super().__call__(like, sigma, sigma_next)

    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    last(name, gaussian, X, sigmas, Counting([0]))
    expected = {"dpmpp_sde": [math.sqrt(27.0), 3.0, math.sqrt(3.0), 1.0]}
    expected["pc"] = [3.0, 3.0, 1.0, 1.0]
    random = name in (*SDE_SOLVERS, "lcm", "tcd") and name != "ddim"
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
    assert all(step.x.dtype == torch.float32 and torch.isfinite(step.x).all() for step in steps)
    if name == "dpm_adaptive":  # which has steps of its own
        places = [step.i for step in steps]
        assert places == sorted(places)
        assert (places[-1], steps[-1].sigma) == (n - 1, 0)
        return
    assert [step.i for step in steps] == list(range(n))
    assert [step.sigma for step in steps] == pytest.approx(sigmas[1:].tolist())
    twice = name.removesuffix("_cfg_pp") in TWICE
    assert len(calls) == (2 * n - 1 if twice else n + 1 if name == "pndm" and n > 1 else n)
    if name not in ("lms", "pndm"):  # which extrapolate to the very end
        assert torch.equal(steps[-1].x, steps[-1].x0)


FIRST_ORDER_STARTS = [
    "ddim", "euler", "lms", "pndm", "ipndm", "ipndm_v", "deis", "gradient_estimation", "dpmpp_2m", "dpmpp_2s",
    "dpmpp_3m", "dpm_fast", "res_multistep", "unipc",
]  # fmt: skip


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
    # The lengths of its own steps come of the state, to rounding.
    tolerance = 1e-3 if name == "dpm_adaptive" else 2e-5
    assert float((wide - narrow).abs().max() / wide.abs().max()) < tolerance
    assert 0.5 < float(wide.std()) < 2


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.alone])
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
