"""Every sampler and spacing that diffusers has, against its scheduler, on a cheap float64 denoiser.

diffusers' way: scale the input, call the network, step. Ours: the same network through `Prediction` and a
solver, with the same noise. diffusers casts levels and some states to fp32, which costs up to 1.5e-6; so its
formulas are run in float64 here, on its own fp32 levels. Its DDIM and PNDM step to ``t - 1000 // n`` whatever
the grid, wrong where n does not divide 1000: a float64 reference on its timesteps takes their place there.
"""

import copy
import functools
import importlib
import itertools
import math
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules
from tiny_pipeline import PEERS

from ldm.diffusion.prediction import c_in
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-6
STEPS = (1, 2, 7, 20)
PREDICTIONS = ("epsilon", "v_prediction")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WITHOUT_SIGMA_SPACINGS = ("ddpm", "ddim", "pndm", "euler_a", "lcm")
ZERO_SNR = ("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")
WITH_TIMESTEPS = ("ddpm", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "lcm")

SHAPE = (2, 3, 4, 4)
NOISES = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)).double() for k in range(64)]


def network(x, t):
    """A cheap nonlinear stand-in for a U-Net."""
    t = float(t) / 1000
    return torch.tanh(1.3 * x + 0.4 * x.roll(1, 1) - 0.3 * x.roll(1, -1) + math.sin(3 * t) / 2) * (
        0.6 + 0.4 * t
    )


class SameNoise:
    """The k-th draw is NOISES[k], for both sides; the 0th is where they start."""

    def __init__(self):
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return NOISES[self.count]


class Float64Torch:
    """torch, but that ``torch.float32`` is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@functools.cache
def scheduler_of(class_name, options):
    return getattr(diffusers, class_name)(**dict(options))


def theirs(config, n, monkeypatch, output=network, eta=None, skipped=0, **lists):
    """The last sample of diffusers' scheduler, with its arithmetic in float64, from step `skipped` on."""
    # Many of them compute a grid of 1000 steps when they are made; the prediction has no part in it.
    options = {k: v for k, v in config.items() if k not in ("_class_name", "prediction_type")}
    scheduler = copy.deepcopy(scheduler_of(config["_class_name"], tuple(options.items())))
    scheduler.register_to_config(prediction_type=config.get("prediction_type", "epsilon"))
    scheduler.set_timesteps(n, **lists) if n else scheduler.set_timesteps(**lists)
    same, module = SameNoise(), importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", same, raising=False)
    scheduler.noise_sampler = same
    monkeypatch.setattr(module, "torch", Float64Torch())
    for table in ("sigmas", "alphas_cumprod"):
        if hasattr(scheduler, table):
            setattr(scheduler, table, getattr(scheduler, table).double())
    x = NOISES[0] * scheduler.init_noise_sigma
    if skipped:
        scheduler.set_begin_index(skipped)
    for t in scheduler.timesteps[skipped:]:
        out = output(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **({} if eta is None else {"eta": eta})).prev_sample
    monkeypatch.undo()
    return x


def ours(config, n, sampler=None, spacing=None, eta=None, skipped=0, **lists):
    schedule = Schedule.from_config(config)
    chosen = SAMPLERS[sampler or schedule.default_sampler]
    grid = schedule.grid(n, spacing, chosen, **lists)
    if skipped:
        grid = grid.last(n - skipped)
        grid = replace(grid, initial_scale=math.hypot(float(grid.sigmas[0]), 1))

    def denoise(x, sigma):
        return Denoised(schedule.prediction.x0(network(x * c_in(sigma), grid.t(sigma)), x, sigma))

    options = {} if eta is None else {"eta": eta}
    options |= {"orders": grid.orders} if grid.orders else {}
    denoise = schedule.bounded(denoise, chosen)
    *_, last = chosen.solver(denoise, NOISES[0] * grid.initial_scale, grid.sigmas, SameNoise(), **options)
    assert last.x.dtype == torch.float64
    return last.x * grid.final_scale


def relative_error(a, b):
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    return float((a - b).abs().max() / b.abs().max())


def config_of(sampler, **changes):
    class_name, extra = PEERS[sampler]
    return {"_class_name": class_name, **BETAS, **extra, **changes}


def eps_of_v(config):
    """`network` as a v network, answering eps."""
    schedule = Schedule.from_config(config)

    def output(x, t):
        alpha = schedule.alphas_cumprod[int(t)].sqrt()
        return alpha * network(x, t) + (1 - alpha**2).sqrt() * x

    return output


def spacings_of(sampler):
    """(name, config changes) of every grid that diffusers' scheduler of that sampler can make."""
    if sampler == "lcm":
        yield "lcm", {}
        return
    if sampler == "dpmpp_2s":
        yield "linspace", {}
    else:
        yield "leading", {"timestep_spacing": "leading"}
        yield "leading+1", {"timestep_spacing": "leading", "steps_offset": 1}
        yield "trailing", {"timestep_spacing": "trailing"}
        yield "linspace", {"timestep_spacing": "linspace"}
    if sampler not in WITHOUT_SIGMA_SPACINGS:
        bases = ("linspace", "leading", "trailing") if SAMPLERS[sampler].rules.family == "k" else (None,)
        for spacing, base in itertools.product(("karras", "exponential", "beta"), bases):
            changes = {"timestep_spacing": base} if base else {}
            yield f"{spacing} on {base}" if base else spacing, {f"use_{spacing}_sigmas": True, **changes}


def steps_past_the_grid(sampler, spacing, n):
    """Whether diffusers' ``t - 1000 // n`` is not the next timestep of the grid."""
    if sampler not in ("ddim", "pndm") or n == 1:
        return False
    return spacing == "linspace" or (spacing == "trailing" and 1000 % n != 0)


def whole_grid():
    for sampler, prediction in itertools.product(PEERS, PREDICTIONS):
        for (name, changes), n in itertools.product(spacings_of(sampler), STEPS):
            if not steps_past_the_grid(sampler, name, n):
                yield pytest.param(sampler, prediction, changes, n, id=f"{sampler}-{prediction}-{name}-{n}")


@pytest.mark.parametrize(("sampler", "prediction", "changes", "n"), list(whole_grid()))
def test_equals_diffusers(sampler, prediction, changes, n, monkeypatch):
    config = config_of(sampler, prediction_type=prediction, **changes)
    if sampler == "pndm" and prediction == "v_prediction":
        # diffusers combines raw v outputs of several timesteps as if they were eps; ours combines eps.
        want = theirs({**config, "prediction_type": "epsilon"}, n, monkeypatch, output=eps_of_v(config))
    else:
        want = theirs(config, n, monkeypatch)
    assert relative_error(ours(config, n, sampler), want) < TOLERANCE


def reference(config, n, history_weights):
    """DDIM, or with `history_weights` PLMS, in variance-preserving float64 on diffusers' own timesteps."""
    options = {key: value for key, value in config.items() if key != "_class_name"}
    scheduler = diffusers.DDIMScheduler(**{k: v for k, v in options.items() if k != "skip_prk_steps"})
    scheduler.set_timesteps(n)
    alphas = scheduler.alphas_cumprod.double()
    eps_at = network if config["prediction_type"] == "epsilon" else eps_of_v(config)
    t = scheduler.timesteps.tolist()
    x, history = NOISES[0], []
    for here, after in itertools.pairwise([*t, None]):
        a, b = alphas[here], 1.0 if after is None else alphas[after]

        def transfer(eps, x=x, a=a, b=b):
            return b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps

        eps = eps_at(x, here)
        history = [eps, *history[:3]]
        if history_weights and len(history) == 1 and after is not None:
            eps = (eps + eps_at(transfer(eps), after)) / 2
        elif history_weights:
            weights = history_weights[len(history) - 1]
            eps = sum(weight * old for weight, old in zip(weights, history, strict=True))
        x = transfer(eps)
    return x


PLMS = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
@pytest.mark.parametrize(
    ("spacing", "n"), [("trailing", 7), ("linspace", 2), ("linspace", 7), ("linspace", 20)]
)
def test_equals_reference_where_diffusers_steps_past_the_grid(sampler, prediction, spacing, n):
    config = config_of(sampler, prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=True)
    want = reference(config, n, PLMS if sampler == "pndm" else None)
    assert relative_error(ours(config, n), want) < TOLERANCE


def test_reference_is_diffusers_where_its_grid_is_right(monkeypatch):
    for sampler, weights in (("ddim", None), ("pndm", PLMS)):
        config = config_of(
            sampler, prediction_type="epsilon", timestep_spacing="trailing", set_alpha_to_one=True
        )
        assert relative_error(reference(config, 20, weights), theirs(config, 20, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_eta(eta, n, prediction, monkeypatch):
    config = config_of("ddim", prediction_type=prediction, steps_offset=1)
    assert relative_error(ours(config, n, eta=eta), theirs(config, n, monkeypatch, eta=eta)) < TOLERANCE


@pytest.mark.parametrize("sampler", list(PEERS))
def test_defaults_where_the_config_is_silent(sampler, monkeypatch):
    class_name, extra = PEERS[sampler]
    config = {"_class_name": class_name, **extra}
    assert relative_error(ours(config, 7, sampler), theirs(config, 7, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_last_alpha_that_is_not_one(sampler, n, monkeypatch):
    config = config_of(sampler, set_alpha_to_one=False, steps_offset=1)
    assert relative_error(ours(config, n), theirs(config, n, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2s", "dpmpp_2m_sde", "unipc"])
def test_last_sigma_that_is_not_zero(sampler, n, monkeypatch):
    changes = {} if sampler == "dpmpp_2s" else {"timestep_spacing": "trailing"}
    config = config_of(sampler, final_sigmas_type="sigma_min", **changes)
    assert relative_error(ours(config, n, sampler), theirs(config, n, monkeypatch)) < TOLERANCE


SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
ORDERED = ("dpmpp_2m", "dpmpp_2s", "dpmpp_2m_sde", "unipc")


@pytest.mark.parametrize("n", [1, 9, 10, 14, 15, 20])
@pytest.mark.parametrize("lower", [None, True, False])
@pytest.mark.parametrize("sampler", ORDERED)
def test_order_of_the_last_steps(sampler, lower, n, monkeypatch):
    """`lower_order_final`, silent and said, on both sides of DPM++ 2M's 15 steps."""
    config = config_of(sampler, **SIGMA_MIN, **({} if lower is None else {"lower_order_final": lower}))
    assert relative_error(ours(config, n, sampler), theirs(config, n, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_euler_at_final(sampler, monkeypatch):
    config = config_of(sampler, **SIGMA_MIN, euler_at_final=True)
    got = ours(config, 20, sampler)
    assert relative_error(got, theirs(config, 20, monkeypatch)) < TOLERANCE
    assert relative_error(got, ours(config_of(sampler, **SIGMA_MIN), 20, sampler)) > 1e-4


@pytest.mark.parametrize("last", [{}, SIGMA_MIN])
@pytest.mark.parametrize(("n", "skipped"), [(10, 3), (10, 4), (11, 5), (20, 7), (20, 19)])
@pytest.mark.parametrize("sampler", ORDERED)
def test_a_run_that_begins_midway_goes_on_with_the_whole_grid(sampler, n, skipped, last, monkeypatch):
    """DPM++ 2S's pairs and DPM++ 2M's 15 steps are those of the whole grid: from an image, say."""
    config = config_of(sampler, **last)
    want = theirs(config, n, monkeypatch, skipped=skipped)
    assert relative_error(ours(config, n, sampler, skipped=skipped), want) < TOLERANCE


CLIP = {"clip_sample": True, "clip_sample_range": 0.7}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.6}
BOUNDED = [
    *((sampler, CLIP) for sampler in ("ddim", "ddpm", "heun", "lcm")),
    *((sampler, THRESHOLD) for sampler in ("ddim", "ddpm", "lcm", *ORDERED)),
    *((sampler, CLIP | THRESHOLD) for sampler in ("ddim", "ddpm")),
    ("ddim", {"clip_sample": True}),
    ("dpmpp_2m", {"thresholding": True}),
]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "bounds"), BOUNDED)
def test_bounds_on_x0(sampler, bounds, prediction, monkeypatch):
    config = config_of(sampler, prediction_type=prediction, **bounds)
    got = ours(config, 7, sampler)
    assert relative_error(got, theirs(config, 7, monkeypatch)) < TOLERANCE
    if sampler != "lcm":  # whose answers here are within 1 in the end
        assert relative_error(got, ours(config_of(sampler, prediction_type=prediction), 7, sampler)) > 1e-2


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_bounds_on_x0_with_fresh_noise(eta, monkeypatch):
    config = config_of("ddim", **CLIP)
    assert relative_error(ours(config, 7, eta=eta), theirs(config, 7, monkeypatch, eta=eta)) < TOLERANCE


@pytest.mark.parametrize(
    ("sampler", "bounds"),
    [("euler", CLIP), ("euler", THRESHOLD), ("pndm", CLIP), ("dpmpp_2m", CLIP), ("heun", THRESHOLD)],
)
def test_bounds_that_a_sampler_of_diffusers_does_not_heed(sampler, bounds):
    bounded = ours({**config_of(sampler), **bounds}, 7, sampler)
    assert torch.equal(bounded, ours(config_of(sampler), 7, sampler))


def zero_snr_grid():
    for case in itertools.product(ZERO_SNR, ("leading", "trailing", "linspace"), STEPS, PREDICTIONS):
        if not steps_past_the_grid(*case[:3]):
            yield case


@pytest.mark.parametrize(("sampler", "spacing", "n", "prediction"), list(zero_snr_grid()))
def test_zero_terminal_snr(sampler, spacing, n, prediction, monkeypatch):
    changes = {"timestep_spacing": spacing, "rescale_betas_zero_snr": True, "prediction_type": prediction}
    config = config_of(sampler, **changes)
    mine = ours(config, n, sampler)
    starts_at_pure_noise = Schedule.from_config(config).grid(n, None, sampler).timesteps[0] == 999
    if prediction == "epsilon" and sampler in ("ddpm", "ddim", "lcm") and starts_at_pure_noise:
        # diffusers divides by alpha = 0; ours clamps, as diffusers does in the other samplers.
        assert not torch.isfinite(theirs(config, n, monkeypatch)).all()
        assert torch.isfinite(mine).all()
    else:
        assert relative_error(mine, theirs(config, n, monkeypatch)) < TOLERANCE


AYS = list(AysSchedules["StableDiffusionTimesteps"])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timesteps", [AYS, [999, 500, 3], [640]])
@pytest.mark.parametrize("sampler", WITH_TIMESTEPS)
def test_own_timesteps(sampler, timesteps, prediction, monkeypatch):
    config = config_of(sampler, prediction_type=prediction)
    if (
        sampler == "lcm"
    ):  # a long way off the distilled timesteps its boundary condition, which we drop, is felt
        config["timestep_scaling"] = 1e4
    want = theirs(config, None, monkeypatch, timesteps=timesteps)
    assert relative_error(ours(config, None, sampler, timesteps=timesteps), want) < TOLERANCE


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_ays_is_its_list_at_ten_steps(sampler, monkeypatch):
    config = config_of(sampler)
    want = theirs(config, None, monkeypatch, timesteps=AYS)
    got = ours(config, 10, sampler, "ays")
    # At other step counts it has no peer; the scale of the first state is then the exact one.
    assert relative_error(got, want) < (TOLERANCE if sampler == "dpmpp_2m" else 5e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigmas", [[14.615, 6.475, 3.861, 1.396, 0.399, 0.0], [9.0, 0.0], [7.0, 2.0, 0.5]])
def test_own_sigmas(sigmas, prediction, monkeypatch):
    config = config_of("euler", prediction_type=prediction)
    want = theirs(config, None, monkeypatch, sigmas=sigmas)
    assert relative_error(ours(config, None, sigmas=sigmas), want) < TOLERANCE


OTHER_BETAS = [("ddim", {}), ("euler", {}), ("unipc", {}), ("dpmpp_sde", {"use_karras_sigmas": True})]


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("sampler", "changes"), OTHER_BETAS)
def test_other_betas(sampler, changes, betas, monkeypatch):
    config = config_of(sampler, prediction_type="v_prediction", **{**changes, "beta_schedule": betas})
    assert relative_error(ours(config, 7), theirs(config, 7, monkeypatch)) < TOLERANCE


def test_trained_betas(monkeypatch):
    betas = tuple(torch.linspace(1e-3, 0.03, 400).tolist())
    config = config_of("euler", trained_betas=betas, num_train_timesteps=400)
    assert relative_error(ours(config, 7), theirs(config, 7, monkeypatch)) < TOLERANCE


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "heun", "lms", "dpmpp_2m", "dpmpp_2s", "unipc"])
def test_sample_prediction(sampler, monkeypatch):
    config = config_of(sampler, prediction_type="sample")
    assert relative_error(ours(config, 7), theirs(config, 7, monkeypatch)) < TOLERANCE
