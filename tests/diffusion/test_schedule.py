"""Schedules, grids and scheduler configs. parity/test_schedulers.py shows that grids equal diffusers'."""

import dataclasses
import inspect
import itertools
import math
import warnings

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from hub_configs import LOW_RES_SCHEDULER, SCHEDULERS

from ldm.diffusion import scheduler_config
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.samplers import SAMPLERS, SPACINGS, resolve_spacing
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.scheduler_config import noise_levels
from ldm.errors import UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = {  # as in the pipeline folders of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    **SD,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    **SD,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
SIGMA_OF_980 = Schedule.from_config(ZERO_SNR).sigma(980)


@pytest.fixture
def schedule():
    return Schedule.from_config(SD15)


@pytest.fixture
def zero_snr():
    return Schedule.from_config(ZERO_SNR)


def test_alphas_are_those_of_diffusers(schedule, zero_snr):
    for config, mine in ((SD15, schedule), (ZERO_SNR, zero_snr)):
        name = config["_class_name"]
        theirs = getattr(diffusers, name)(
            **{
                k: v
                for k, v in config.items()
                if k[0] != "_" and (k, name) != ("clip_sample", "PNDMScheduler")
            }
        )
        assert mine.alphas_cumprod.dtype == torch.float64
        assert torch.equal(mine.alphas_cumprod, theirs.alphas_cumprod.double())


def test_sigma_and_t_are_inverse(schedule, zero_snr):
    t = torch.arange(1000, dtype=torch.float64)
    for each in (schedule, zero_snr):
        sigma = each.sigma(t)
        a = each.alphas_cumprod
        assert torch.allclose(sigma[:-1], ((1 - a) / a).sqrt()[:-1], rtol=1e-12)
        assert torch.allclose(each.t(sigma), t, atol=1e-9)
        assert float(each.t(each.sigma(499.5))) == pytest.approx(499.5, abs=1e-3)
    assert float(zero_snr.sigma(999)) == 1e10
    assert schedule.sigma(torch.tensor([[1, 2], [3, 4]])).shape == (2, 2)
    assert (float(schedule.t(1e-9)), float(schedule.t(1e9))) == (0, 999)


def test_grids_differ_by_sampler(schedule):
    """One spacing name, 20 steps, as measured with diffusers."""
    starts = {name: float(schedule.grid(20, "leading", name).timesteps[0]) for name in SAMPLERS}
    dpm = {name for name in SAMPLERS if name.startswith(("dpmpp_2m", "dpmpp_3m")) or name == "dpmpp_2s"}
    dpm |= {"unipc", "deis", "sa_solver"}
    assert starts == {name: 941 if name in dpm else 951 for name in SAMPLERS}
    whole, fractional = (schedule.grid(20, "karras", name).timesteps for name in ("dpmpp_2m", "euler"))
    assert torch.equal(whole, fractional.round())
    assert not torch.equal(whole, fractional)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [SD15, ZERO_SNR], ids=["sd15", "zero_snr"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 50, 333, 999, 1000])
def test_every_grid_falls_and_is_finite(config, n):
    schedule = Schedule.from_config(config)
    # All that a grid follows.
    one_of_each = {(sampler.rules, sampler.orders): name for name, sampler in SAMPLERS.items()}
    for name, spacing in itertools.product(one_of_each.values(), SPACINGS):
        if spacing in ("beta", "beta_timesteps") and n > 50:
            continue  # slow, and no different
        if (spacing == "lcm" and n > 50) or (SAMPLERS[name].rules.family == "dpm" and n > 998):
            continue  # these have fewer timesteps than that; see test_bad_grids
        grid = schedule.grid(n, spacing, name)
        assert grid.sigmas.shape == (n + 1,)
        assert grid.timesteps.shape == (n,)
        assert torch.isfinite(grid.sigmas).all()
        assert (grid.sigmas[:-1].diff() < 0).all()
        assert (grid.sigmas.diff() <= 0).all()
        assert 0 <= float(grid.timesteps.min()) <= float(grid.timesteps.max()) <= 999
        assert grid.initial_scale == pytest.approx(float(grid.sigmas[0]), rel=1e-3) or grid.sigmas[0] < 30


def test_listed_sigmas_use_their_listed_timesteps(schedule):
    grid = schedule.grid(20, "karras", "dpmpp_2m")
    assert [float(grid.t(sigma)) for sigma in grid.sigmas[:-1]] == grid.timesteps.tolist()
    between = float((grid.sigmas[3] * grid.sigmas[4]).sqrt())
    assert float(grid.t(between)) == float(schedule.t(between))
    assert grid.timesteps[4] < grid.t(between) < grid.timesteps[3]


def test_default_spacing_is_the_configs_then_the_samplers(schedule, zero_snr):
    assert schedule.default_sampler == "pndm"
    assert (schedule.sigma_spacing, schedule.timestep_spacing) == (None, None)
    assert float(schedule.grid(20, sampler="ddim").timesteps[0]) == 951  # leading
    assert float(schedule.grid(20, sampler="euler").timesteps[0]) == 999  # linspace
    assert zero_snr.timestep_spacing == "trailing"
    assert zero_snr.grid(20, sampler="euler").timesteps.tolist() == list(range(999, 0, -50))
    karras = Schedule.from_config(
        {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, **SD}
    )
    assert karras.sigma_spacing == "karras"
    lu = Schedule.from_config({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True, **SD})
    assert lu.spacing_for(SAMPLERS["dpmpp_2m"]) == "lu_lambdas"
    assert torch.equal(karras.grid(9, sampler="dpmpp_2m").sigmas, karras.grid(9, "Karras", "dpmpp_2m").sigmas)


def test_last_sigma(schedule):
    lowest = float(schedule.sigma(0))
    grid = schedule.grid(10, sampler="ddim")  # set_alpha_to_one is False
    assert float(grid.sigmas[-1]) == lowest
    assert grid.final_scale == 1 / math.hypot(lowest, 1)
    for name in ("euler", "dpmpp_2m", "ddpm", "lcm"):
        grid = schedule.grid(10, sampler=name)
        assert float(grid.sigmas[-1]) == 0
        assert grid.final_scale == 1


def test_zero_terminal_snr_grids(zero_snr):
    """Each sampler starts where diffusers' does; grids in sigma take one step from pure noise."""
    assert zero_snr.zero_terminal_snr
    starts = {name: float(zero_snr.grid(20, "trailing", name).sigmas[0]) for name in SAMPLERS}
    clamped = {"euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m", "unipc"}
    clamped |= {"dpmpp_3m_sde", "euler_cfg_pp", "euler_a_cfg_pp", "dpmpp_2m_cfg_pp"}
    assert starts == {
        name: pytest.approx(math.sqrt(2**24 - 1) if name in clamped else 1e10) for name in SAMPLERS
    }
    for spacing in ("karras", "exponential"):
        grid = zero_snr.grid(20, spacing, "dpmpp_2m")
        assert grid.timesteps[:2].tolist() == [999, pytest.approx(980)]
        assert grid.sigmas[1].item() == pytest.approx(float(SIGMA_OF_980))
        assert grid.sigmas[-2].item() == pytest.approx(float(zero_snr.sigma(0)))
        assert zero_snr.grid(1, spacing, "ddim").sigmas.tolist() == [1e10, 0]
    beta = zero_snr.grid(20, "beta", "dpmpp_2m").timesteps / 999  # over timesteps there
    assert scipy.stats.beta.cdf(beta, 0.6, 0.6) == pytest.approx(np.linspace(1, 0, 20))
    assert zero_snr.grid(1, "beta", "ddim").sigmas.tolist() == [1e10, 0]
    eps = Schedule.from_config({**ZERO_SNR, "prediction_type": "epsilon"})
    assert float(eps.grid(20, sampler="ddim").sigmas[0]) < 4097


def test_warns_where_a_run_hardly_starts(schedule, zero_snr):
    with pytest.warns(UserWarning, match="starts at timestep 1, almost without noise"):
        schedule.grid(1, "leading", "ddim")
    with pytest.warns(UserWarning, match="starts at timestep 0, almost without noise"):
        schedule.grid(1, "linspace", "euler")
    with pytest.warns(UserWarning, match="timestep 950, but this model was trained to start from pure noise"):
        zero_snr.grid(20, "leading", "ddim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in SAMPLERS:
            zero_snr.grid(20, None, name)
            schedule.grid(20, None, name)
            zero_snr.grid(1, "trailing", name)


def test_own_lists(schedule):
    grid = schedule.grid(None, sampler="euler", timesteps=[900, 500.5, 3])
    assert grid.timesteps.tolist() == [900, 500.5, 3]
    assert grid.sigmas.tolist() == [*schedule.sigma(torch.tensor([900, 500.5, 3])).tolist(), 0]
    grid = schedule.grid(None, sampler="ddim", sigmas=[10, 2, 0.5])
    assert grid.sigmas.tolist() == [10, 2, 0.5]
    assert grid.timesteps.tolist() == schedule.t(torch.tensor([10.0, 2.0])).tolist()
    assert grid.final_scale == 1 / math.hypot(0.5, 1)


BAD_GRIDS = [
    ({"n": 0}, "0 steps: give a number of steps from 1 to 1000"),
    ({"n": 1001}, "1001 steps"),
    ({"n": None}, "None steps"),
    ({"n": 60, "spacing": "lcm"}, "at most 50"),
    ({"n": 20, "spacing": "karas"}, "unknown spacing 'karas': did you mean karras"),
    ({"n": 20, "sampler": "dimm"}, "unknown sampler 'dimm': did you mean ddim"),
    ({"n": 1000, "spacing": "leading", "sampler": "dpmpp_2m"}, "take fewer steps"),
    ({"n": None, "timesteps": [3, 500]}, "does not fall"),
    ({"n": None, "timesteps": [500, 500]}, "does not fall"),
    ({"n": None, "timesteps": []}, "at least one step"),
    ({"n": None, "timesteps": [1200, 3]}, "trained on 0 to 999"),
    ({"n": None, "timesteps": [5, -3]}, "trained on 0 to 999|does not fall"),
    ({"n": None, "timesteps": [math.nan, 1]}, "finite"),
    ({"n": None, "sigmas": [0.0]}, "at least one step"),
    ({"n": None, "sigmas": [1.0, 2.0, 0.0]}, "does not fall"),
    ({"n": None, "sigmas": [2.0, -1.0]}, "does not fall"),
    ({"n": None, "sigmas": [1.0], "timesteps": [3]}, "both given"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_GRIDS)
def test_bad_grids(schedule, arguments, message):
    with pytest.raises(UserError, match=message):
        schedule.grid(**arguments)


def test_spacing_names():
    for name in SPACINGS:
        assert resolve_spacing(name) == name
    assert [resolve_spacing(name) for name in ("Karras", "SGM Uniform", "Align Your Steps")] == [
        "karras",
        "sgm_uniform",
        "ays",
    ]


def test_nothing_mutates(schedule):
    grid = schedule.grid(5)
    for thing, name in ((schedule, "steps_offset"), (grid, "sigmas"), (SAMPLERS["ddim"], "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 0)


CONFIGS = {
    "DDPMScheduler": ("ddpm", 0.02),
    "DDIMScheduler": ("ddim", 0.02),
    "PNDMScheduler": ("pndm", 0.02),
    "EulerDiscreteScheduler": ("euler", 0.02),
    "EulerAncestralDiscreteScheduler": ("euler_a", 0.02),
    "HeunDiscreteScheduler": ("heun", 0.012),
    "LMSDiscreteScheduler": ("lms", 0.02),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", 0.02),
    "DPMSolverSinglestepScheduler": ("dpmpp_2s", 0.02),
    "DPMSolverSDEScheduler": ("dpmpp_sde", 0.012),
    "UniPCMultistepScheduler": ("unipc", 0.02),
    "KDPM2DiscreteScheduler": ("dpm2", 0.012),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_a", 0.012),
    "TCDScheduler": ("tcd", 0.012),
    "DDIMParallelScheduler": ("ddim", 0.02),
    "DDPMParallelScheduler": ("ddpm", 0.02),
    "LCMScheduler": ("lcm", 0.012),
}


@pytest.mark.parametrize("class_name", CONFIGS)
def test_what_diffusers_saves_is_understood(class_name):
    """Every key that diffusers writes for its defaults."""
    scheduler = getattr(diffusers, class_name)()
    config = {"_class_name": class_name, **scheduler.config}
    schedule = Schedule.from_config(config)
    sampler, beta_end = CONFIGS[class_name]
    assert schedule.default_sampler == sampler
    assert scheduler.betas[-1] == pytest.approx(beta_end)
    assert torch.equal(schedule.alphas_cumprod, torch.cumprod(1 - scheduler.betas, 0).double())
    silent = Schedule.from_config({"_class_name": class_name})
    assert torch.equal(silent.alphas_cumprod, schedule.alphas_cumprod)
    assert silent.prediction is Prediction.EPSILON
    assert silent.bounds is None  # an absent clip_sample: latents are not pixels
    assert (schedule.bounds is not None) == scheduler.config.get("clip_sample", False)


def test_sde_algorithm():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert Schedule.from_config(config).default_sampler == "dpmpp_2m_sde"


REFUSED = [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler is not supported"),
    ({"clip_sample": "yes"}, "clip_sample='yes'"),
    ({"thresholding": True, "sample_max_value": "1"}, "sample_max_value='1'"),
    ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    ({"variance_type": "learned"}, "variance_type='learned'"),
    ({"solver_order": 3}, "solver_order=3"),
    ({"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ({"timestep_spacing": "wide"}, "timestep_spacing='wide'"),
    ({"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
    ({"brand_new_key": 1}, "unknown key 'brand_new_key'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        Schedule.from_config({"_class_name": "DDIMScheduler", **changes})


@pytest.mark.parametrize("key", ["feature_extractor", "sigma_data", "safety_checker"])
def test_settings_of_other_classes_are_ignored_and_said(key):
    with pytest.warns(UserWarning, match=f"{key} is no setting of DDIMScheduler, and ignored"):
        schedule = Schedule.from_config({"_class_name": "DDIMScheduler", key: [None, None]})
    assert torch.equal(schedule.alphas_cumprod, Schedule.from_config({}).alphas_cumprod)


def test_foreign_settings_are_settings_of_diffusers():
    """And none that its schedulers for latents read."""
    names = [name for name in dir(diffusers) if name.endswith(("Scheduler", "Pipeline"))]
    parameters = [set(inspect.signature(getattr(diffusers, name).__init__).parameters) for name in names]
    assert set().union(*parameters) >= scheduler_config._FOREIGN - {"watermarker"}
    for name in CONFIGS:
        own = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert not own.keys() & scheduler_config._FOREIGN


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SCHEDULERS)
@pytest.mark.parametrize("n", [1, 4, 30])
def test_every_family_walks_the_grid_of_its_own_scheduler(family, n):
    """Noise levels, prediction, timesteps, and sigmas where diffusers has any, from the config on the hub."""
    config = SCHEDULERS[family]
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs.set_timesteps(n)
    schedule = Schedule.from_config(config)
    assert schedule.prediction.value == theirs.config.prediction_type
    if not schedule.zero_terminal_snr:  # there diffusers' Euler clamps its last one
        assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod.double())
    grid = schedule.grid(n, sampler=schedule.default_sampler)
    wanted = theirs.timesteps.double()
    if config["_class_name"] == "PNDMScheduler":  # names its second timestep twice
        wanted = torch.tensor(sorted(set(wanted.tolist()), reverse=True))
    assert grid.timesteps.numpy() == pytest.approx(wanted.numpy(), abs=1e-3)
    if hasattr(theirs, "sigmas") and len(theirs.sigmas) == n + 1:
        assert grid.sigmas.numpy() == pytest.approx(theirs.sigmas.double().numpy(), rel=1e-5, abs=1e-8)
    if "Euler" in config["_class_name"]:
        assert grid.initial_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned"}])
def test_low_res_scheduler_adds_noise_as_diffusers(changes):
    """Its variance_type is of no matter: it only ever adds noise."""
    config = LOW_RES_SCHEDULER | changes
    theirs = diffusers.DDPMScheduler.from_config(config)
    x, noise, level = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([20, 350])
    a = noise_levels(config)[level].reshape(2, 1, 1, 1)
    ours = (a.sqrt() * x + (1 - a).sqrt() * noise).float()
    assert torch.allclose(ours, theirs.add_noise(x, noise, level), atol=1e-6)
    if "variance_type" in changes:
        with pytest.raises(UserError, match="variance_type='learned'"):
            Schedule.from_config(config)
    with pytest.raises(UserError, match="unknown key 'brand_new_key'"):
        noise_levels(config | {"brand_new_key": 1})


def test_every_key_of_diffusers_is_honoured_harmless_or_refused():
    sets = [getattr(scheduler_config, name) for name in ("_HONOURED", "_HARMLESS", "_OFF")]
    for class_name in CONFIGS:
        for key in inspect.signature(getattr(diffusers, class_name).__init__).parameters:
            assert key == "self" or sum(key in each for each in sets) == 1, (class_name, key)


@pytest.mark.parametrize("config", [SD15, ZERO_SNR], ids=["SD15", "zero SNR"])
@pytest.mark.parametrize(
    ("start", "stop", "first", "last"), [(0, 1, 0, 8), (0.25, 0.75, 2, 6), (0.5, 1, 4, 8)]
)
def test_a_part_of_the_way_is_a_share_of_the_timesteps(config, start, stop, first, last):
    """Whatever the sampler's sigmas are, the k-th eighth of 8 even timesteps is its k-th step."""
    schedule = Schedule.from_config(config)
    low, high = schedule.between(start, stop)
    for sampler in ("ddim", "euler", "dpmpp_2m"):
        inside = [low <= sigma < high for sigma in schedule.grid(8, "trailing", sampler).sigmas[:-1].tolist()]
        assert inside == [first <= k < last for k in range(8)]
    assert schedule.between(0, 1) == (0, math.inf)
