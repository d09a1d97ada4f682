"""Solvers against diffusers' schedulers, on the same noise levels and with the same noise, in float64.

test_schedulers.py has those whose grids are diffusers' too. States are turned from diffusers'
variance-preserving space where a scheduler works there.
"""

import importlib
import itertools
import math

import diffusers
import pytest
import torch
from cheap_denoiser import BETAS, LEVELS, NOISES, SCHEDULE, SameNoise, error, ours, x0_at

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.solvers import Denoised


class Float64Torch:
    """torch, but that ``torch.float32`` is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def theirs(monkeypatch, scheduler, levels, in_vp, **options):
    """The last state of a scheduler whose noise levels are replaced by `levels`, in sigma space."""
    n, module = len(levels) - 1, importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", SameNoise(), raising=False)
    monkeypatch.setattr(module, "torch", Float64Torch())
    scheduler.set_timesteps(n)
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    x = levels[0] * NOISES[0]
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        scale = math.hypot(sigma, 1) if in_vp else 1.0
        eps = (x - x0_at(x, sigma)) / sigma
        sample = scheduler.step(eps, scheduler.timesteps[i], x / scale, **options).prev_sample
        x = sample * (math.hypot(sigma_next, 1) if in_vp else 1.0)
    monkeypatch.undo()
    return x


SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTISTEP = [
    ("dpmpp_3m", "DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    ("dpmpp_2m_sde_heun", "DPMSolverMultistepScheduler", {**SDE, "solver_type": "heun"}, {}),
    ("deis", "DEISMultistepScheduler", {}, {}),
    ("deis", "DEISMultistepScheduler", {"solver_order": 3}, {"order": 3}),
]


@pytest.mark.parametrize(("name", "class_name", "config", "options"), MULTISTEP)
@pytest.mark.parametrize("more", [0, 12])
def test_multistep_solvers_are_diffusers(name, class_name, config, options, more, monkeypatch):
    """On both sides of the 15 steps below which the last ones are of lower order."""
    top = [80.0 * 0.88**k for k in range(more)]
    levels = [*top, *LEVELS] + ([0.0] if class_name.startswith("DPM") else [])
    if SAMPLERS[name].orders:
        options = {**options, "orders": SAMPLERS[name].orders(len(levels) - 1, True, None, False)}
    want = theirs(monkeypatch, getattr(diffusers, class_name)(**BETAS, **config), levels, True)
    assert error(ours(name, levels, **options), want) < 1e-9


@pytest.mark.parametrize("orders", [(2, 2), (3, 3), (1, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_sa_solver_is_diffusers(orders, eta, monkeypatch):
    class Always(SameNoise):
        """diffusers draws in steps without noise too."""

        def __call__(self, like, sigma, sigma_next):
            self.count = LEVELS.index(sigma) + 1
            return NOISES[self.count]

    scheduler = diffusers.SASolverScheduler(
        **BETAS, tau_func=lambda t: eta, predictor_order=orders[0], corrector_order=orders[1]
    )
    want = theirs(monkeypatch, scheduler, LEVELS, True)
    sigmas = torch.tensor(LEVELS, dtype=torch.float64)
    options = {"eta": eta, "predictor_order": orders[0], "corrector_order": orders[1]}
    *_, step = SAMPLERS["sa_solver"].solver(
        lambda x, sigma: Denoised(x0_at(x, sigma)), LEVELS[0] * NOISES[0], sigmas, Always(), **options
    )
    assert error(step.x, want) < 1e-9


def test_sa_solver_adds_noise_in_the_middle_of_the_timesteps(monkeypatch):
    grid = SCHEDULE.grid(20, "linspace", "sa_solver")
    drawn = []

    def noise(like, sigma, sigma_next):
        drawn.append(float(grid.t(sigma)))
        return torch.zeros_like(like)

    x = torch.ones(1, 1, 2, 2)
    list(SAMPLERS["sa_solver"].solver(lambda x, s: Denoised(x0_at(x, s)), x, grid.sigmas, noise, times=grid))
    assert drawn == [t for t in grid.timesteps.tolist() if 200 <= t <= 800]


@pytest.mark.parametrize("name", ["dpm2", "dpm2_a"])
def test_dpm2_is_diffusers(name, monkeypatch):
    class_name = {"dpm2": "KDPM2DiscreteScheduler", "dpm2_a": "KDPM2AncestralDiscreteScheduler"}[name]
    scheduler = getattr(diffusers, class_name)(**BETAS)
    module = importlib.import_module(type(scheduler).__module__)
    scheduler.set_timesteps(12)
    levels = SCHEDULE.grid(12, "linspace", name).sigmas.tolist()
    same = SameNoise()
    monkeypatch.setattr(module, "randn_tensor", same, raising=False)
    x, asked = levels[0] * NOISES[0], []

    def recording(x, sigma):
        asked.append(float(sigma))
        return Denoised(x0_at(x, sigma))

    got = ours(name, levels, recording)
    for t, sigma in zip(scheduler.timesteps, asked, strict=True):
        x = scheduler.step((x - x0_at(x, sigma)) / sigma, t, x).prev_sample
    assert error(got, x) < 1e-5  # diffusers keeps its levels in fp32


def test_ipndm_is_diffusers(monkeypatch):
    """On its own levels, beta / alpha of its cosine."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(12)
    levels = (scheduler.betas / scheduler.alphas).double().tolist()[1:]  # from pure noise it divides by 0
    scheduler._step_index = 1
    x = levels[0] * NOISES[0]
    for i, sigma in enumerate(levels[:-1]):
        alpha, beta = float(scheduler.alphas[i + 1]), float(scheduler.betas[i + 1])
        eps = (x - x0_at(x, sigma)) / sigma
        sample = alpha * x
        v = (eps - sample * beta) / alpha  # its network's output, of which it makes eps again
        x = scheduler.step(v, None, sample).prev_sample / float(scheduler.alphas[i + 2])
        if levels[i + 1] == 0:
            break
        before = x
    assert error(ours("ipndm", levels[:-1]), before) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_is_diffusers(eta, monkeypatch):
    scheduler = diffusers.TCDScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(8)
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", SameNoise())
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    grid = SCHEDULE.grid(8, None, "tcd")
    assert grid.timesteps.tolist() == scheduler.timesteps.tolist()
    levels = grid.sigmas.tolist()
    x = levels[0] * NOISES[0]
    for t, sigma, sigma_next in zip(scheduler.timesteps[:-1], levels, levels[1:], strict=False):
        eps = (x - x0_at(x, sigma)) / sigma
        x = scheduler.step(eps, t, x / math.hypot(sigma, 1), eta=eta).prev_sample * math.hypot(sigma_next, 1)
    assert error(ours("tcd", levels[:-1], eta=eta, times=grid), x) < 1e-9
    ended = ours("tcd", levels, eta=eta, times=grid)
    assert torch.equal(ended, x0_at(ours("tcd", levels[:-1], eta=eta, times=grid), levels[-2]))


def test_euler_with_churn_is_diffusers(monkeypatch):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    want = theirs_with_churn(scheduler, monkeypatch, s_churn=3.0)
    assert error(ours("euler", [*LEVELS, 0.0], s_churn=3.0), want) < 1e-6


def theirs_with_churn(scheduler, monkeypatch, s_churn):
    """As diffusers does, with the network's answer at the raised level, that it does not ask for."""
    levels, n = [*LEVELS, 0.0], len(LEVELS)
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", SameNoise())
    monkeypatch.setattr(module, "torch", Float64Torch())
    scheduler.set_timesteps(n)
    scheduler.sigmas, drawn = torch.tensor(levels, dtype=torch.float64), SameNoise()
    x = levels[0] * NOISES[0]
    for i, sigma in enumerate(levels[:-1]):
        raised = sigma * (1 + min(s_churn / n, math.sqrt(2) - 1))
        state = x + math.sqrt(raised**2 - sigma**2) * drawn()
        eps = (state - x0_at(state, raised)) / raised
        x = scheduler.step(eps, scheduler.timesteps[i], x, s_churn=s_churn).prev_sample
    return x


def test_dpm_fast_is_diffusers(monkeypatch):
    """diffusers' singlestep DPM-Solver of order 3, whose inner levels are the grid's as ours are."""
    config = {"algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun"}
    scheduler = diffusers.DPMSolverSinglestepScheduler(**BETAS, **config, final_sigmas_type="sigma_min")
    levels = LEVELS  # nine steps: three times three
    scheduler.set_timesteps(9)
    scheduler.order_list = [1, 2, 3] * 3
    want = theirs_singlestep(scheduler, levels, monkeypatch)
    assert error(ours("dpm_fast", levels), want) < 1e-9


def theirs_singlestep(scheduler, levels, monkeypatch):
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "torch", Float64Torch())
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    x = levels[0] * NOISES[0]
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        eps = (x - x0_at(x, sigma)) / sigma
        sample = scheduler.step(eps, scheduler.timesteps[i], x / math.hypot(sigma, 1)).prev_sample
        x = sample * math.hypot(sigma_next, 1)
    return x
