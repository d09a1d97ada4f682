"""What a mask keeps: put back for every solver, without a trace in what is drawn."""

from dataclasses import replace

import pytest
import torch
from mixture import PLANE, Mixture

from ldm.diffusion.masked import Known
from ldm.diffusion.noise import Noise
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised

BETAS = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
BETAS |= {"beta_schedule": "scaled_linear", "steps_offset": 1}
KEPT = torch.tensor([1, 0, 1]).reshape(1, 1, 1, 3).bool()
MASK = (~KEPT).double()
X0 = torch.tensor([[0.7, 9.0, -1.2], [0.1, 9.0, 2.0]], dtype=torch.float64).reshape(2, 1, 1, 3)
NOISE = torch.tensor([[0.3, -1.0, 0.8], [-0.4, 0.6, 1.1]], dtype=torch.float64).reshape(2, 1, 1, 3)


def schedule(**changes):
    return Schedule.from_config(BETAS | changes)


def across(x, sigma):
    """A denoiser whose every value depends on all of the state."""
    scaled = x / (1 + sigma**2)
    x0 = scaled + 0.5 * torch.tanh(scaled.sum(-1, keepdim=True))
    return Denoised(x0, log_variance=as_learned)


def as_learned(sigma_next):
    return torch.log(sigma_next**2 / 2)


def draw(name, schedule, begin=lambda x: x):
    """All steps of a sampler, with the known parts put back as in drawing."""
    sampler = SAMPLERS[name]
    grid = schedule.grid(6, "trailing" if schedule.zero_terminal_snr else None, sampler)
    known = Known(grid, X0, NOISE, MASK)
    x = begin(X0 + float(grid.sigmas[0]) * NOISE)
    steps = sampler.solver(known.around(across), x, grid.sigmas, sampler.noise([1, 2]), **sampler.options)
    return grid, [known.put_back(step) for step in steps]


@pytest.mark.parametrize("snr", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_solver_sees_the_known_part_at_every_level(name, snr):
    grid, steps = draw(name, schedule(rescale_betas_zero_snr=snr, prediction_type="v_prediction"))
    own_levels = name in ("dpm_adaptive", "restart")
    levels = [step.sigma for step in steps[:-1]]
    assert own_levels or levels == grid.sigmas[1:-1].tolist()
    for step, sigma in zip(steps[:-1], levels, strict=True):
        assert torch.equal(step.x[..., KEPT[0, 0, 0]], (X0 + float(sigma) * NOISE)[..., KEPT[0, 0, 0]])
    assert torch.allclose((steps[-1].x * grid.final_scale)[..., KEPT[0, 0, 0]], X0[..., KEPT[0, 0, 0]])
    assert all(torch.equal(step.x0[..., KEPT[0, 0, 0]], X0[..., KEPT[0, 0, 0]]) for step in steps)
    assert all(step.x.isfinite().all() for step in steps)


# Of the others steps are as long as norms.
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("pc", "dpm_adaptive")])
def test_what_a_solver_makes_of_the_known_part_does_not_matter(name):
    """Only the first state, which is the run's own, is seen there."""
    sampler, grid = SAMPLERS[name], schedule().grid(6, None, SAMPLERS[name])
    known = Known(grid, X0, NOISE, MASK)

    def tampered(x, sigma):
        d = known.around(across)(x, sigma)
        return replace(d, x0=torch.where(KEPT, 100.0, d.x0), anchor=torch.where(KEPT, -7.0, d.anchor))

    x = X0 + float(grid.sigmas[0]) * NOISE
    runs = [
        list(sampler.solver(denoise, x, grid.sigmas, sampler.noise([1, 2]), **sampler.options))
        for denoise in (known.around(across), tampered)
    ]
    for own, other in zip(*runs, strict=True):
        torch.testing.assert_close(own.x[..., 1], other.x[..., 1])


def test_an_answer_keeps_its_other_fields():
    known = Known(schedule().grid(6), X0, NOISE, MASK)
    sigma = torch.tensor(1.5, dtype=torch.float64)
    x = torch.full((2, 1, 1, 3), 0.4, dtype=torch.float64)
    seen = torch.where(KEPT, X0 + 1.5 * NOISE, x)
    plain, d = across(seen, sigma), known.around(across)(x, sigma)
    assert torch.equal(d.x0, torch.where(KEPT, X0, plain.x0))
    assert d.anchor is d.x0
    assert d.log_variance is plain.log_variance is as_learned
    anchored = known.around(lambda x, sigma: Denoised(2 * x, anchor=3 * x))(x, sigma)
    assert torch.equal(anchored.anchor, torch.where(KEPT, X0, 3 * seen))
    assert torch.equal(anchored.x0, torch.where(KEPT, X0, 2 * seen))


def test_the_first_state_is_the_runs_own():
    grid = schedule().grid(6)
    known = Known(grid, X0, NOISE, MASK)
    x = float(grid.sigmas[0]) * NOISE
    inner = across(x, grid.sigmas[0])
    assert torch.equal(known.around(across)(x, grid.sigmas[0]).x0, torch.where(KEPT, X0, inner.x0))


def test_putting_back_is_not_conditioning():
    """With the exact denoiser of a mixture: one of two numbers is known, and only one mode is near it.

    What is put back tells the other number too little, however many steps are made; the exact denoiser given
    the known number, which training on masks is to learn, draws that mode alone.
    """
    known_mode, count = Mixture([1.0], PLANE.means[:1].tolist(), PLANE.variances[:1].tolist()), 1000
    noise = Noise([3]).initial((count, 1, 2)).reshape(count, 1, 1, 2).double()
    x0 = torch.tensor([1.0, 0.0]).double().expand(count, 1, 1, 2)
    solver, mean, share = SAMPLERS["euler"].solver, float(PLANE.means[0, 1]), {}
    for steps in (20, 100):
        grid = schedule().grid(steps, None, "euler")
        known = Known(grid, x0, noise, torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
        for name, denoise in (("put back", known.around(PLANE.denoise)), ("exact", known_mode.denoise)):
            *_, last = solver(denoise, x0 + float(grid.sigmas[0]) * noise, grid.sigmas, Noise([0]))
            share[name, steps] = float((last.x[..., 1] > mean + 1.0).double().mean())
    assert share["exact", 20] < 0.05 > share["exact", 100]
    assert share["put back", 20] > 0.15 < share["put back", 100]
