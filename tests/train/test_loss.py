"""The loss's parts, each against its own density, a closed form or diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from pydantic import ValidationError
from scipy import stats

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.train.loss import (
    Levels,
    draw_noise,
    draw_timesteps,
    min_snr_weights,
    noisy_latents,
    pixel_losses,
    prior_preservation_loss,
    pyramid_noise,
    sample_weights,
    timestep_probabilities,
    training_target,
)
from ldm.train.loss_recipe import LossSection

CONFIG = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PLAIN = LossSection()


def schedule(prediction="epsilon", zero=False):
    return Schedule.from_config(CONFIG | {"prediction_type": prediction, "rescale_betas_zero_snr": zero})


def levels(prediction="epsilon", zero=False):
    return Levels(schedule(prediction, zero))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- timesteps ---------------------------------------------------------------------------------------------

SAMPLERS = {
    "uniform": LossSection(),
    "range": LossSection(min_timestep=200, max_timestep=700),
    "logit_normal": LossSection(timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.8),
    "logit_normal range": LossSection(timestep_sampling="logit_normal", min_timestep=100, max_timestep=300),
    "importance": LossSection(timestep_sampling="importance", timestep_histogram=(1, 2, 5, 0.5)),
    "importance range": LossSection(
        timestep_sampling="importance", timestep_histogram=(1, 2, 5), min_timestep=300, max_timestep=900
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_follow_their_probabilities(name):
    p = timestep_probabilities(SAMPLERS[name], 1000)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    t = draw_timesteps(p, 100_000, generator())
    assert t.dtype == torch.int64
    assert p[t].min() > 0  # nothing outside the range
    seen = p > 0
    counts, expected = torch.bincount(t, minlength=1000)[seen], 100_000 * p[seen]
    # Bins of 20 timesteps: enough of each for the chi-square distribution to hold.
    bins = np.arange(0, len(counts), 20)
    counts, expected = np.add.reduceat(counts.numpy(), bins), np.add.reduceat(expected.numpy(), bins)
    enough = expected > 5
    scale = counts[enough].sum() / expected[enough].sum()
    assert stats.chisquare(counts[enough], scale * expected[enough]).pvalue > 0.01


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_uniform_timesteps_reach_both_ends_and_no_further(steps):
    p = timestep_probabilities(PLAIN, steps)
    assert torch.equal(p, torch.full((steps,), 1 / steps, dtype=torch.float64))
    t = draw_timesteps(p, 20_000, generator())
    assert (t.min(), t.max()) == (0, steps - 1)


def test_the_outermost_draws_stay_in_the_range(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0, 1 - 2**-53], dtype=torch.float64))
    p = timestep_probabilities(LossSection(min_timestep=200, max_timestep=707), 1000)
    assert draw_timesteps(p, 2, generator()).tolist() == [200, 706]


def test_logit_normal_is_that_of_diffusers():
    p = timestep_probabilities(SAMPLERS["logit_normal"], 1000)
    u = compute_density_for_timestep_sampling("logit_normal", 200_000, 0.5, 0.8, generator=generator(1))
    theirs = np.bincount((u * 1000).long().numpy() // 50, minlength=20)
    expected = p.view(20, 50).sum(1).numpy() * 200_000
    enough = expected > 5
    scaled = expected[enough] * theirs[enough].sum() / expected[enough].sum()
    assert stats.chisquare(theirs[enough], scaled).pvalue > 0.01


def test_logit_normal_quantiles_are_the_normal_ones():
    options = LossSection(timestep_sampling="logit_normal", logit_mean=-0.3, logit_std=1.4)
    cdf = timestep_probabilities(options, 1000).cumsum(0)
    for t in (10, 250, 500, 750, 990):
        assert float(cdf[t - 1]) == pytest.approx(stats.norm.cdf((math.log(t / (1000 - t)) + 0.3) / 1.4))


def test_importance_has_the_histograms_shares():
    p = timestep_probabilities(SAMPLERS["importance"], 1000)
    assert p.view(4, 250).sum(1).tolist() == pytest.approx([1 / 8.5, 2 / 8.5, 5 / 8.5, 0.5 / 8.5])
    p = timestep_probabilities(SAMPLERS["importance range"], 1000)
    assert p[300:334].sum() / p.sum() == pytest.approx(34 / (34 + 333 * 2 + 233 * 5))


@pytest.mark.parametrize("name", ["importance", "importance range"])
def test_importance_weights_keep_the_loss_unbiased(name):
    options, p = SAMPLERS[name], timestep_probabilities(SAMPLERS[name], 1000)
    weights = sample_weights(schedule(), options)
    loss = torch.rand(1000, generator=generator(), dtype=torch.float64)
    low, high = options.min_timestep, options.max_timestep or 1000
    assert float((p * weights * loss).sum()) == pytest.approx(float(loss[low:high].mean()), rel=1e-6)


def test_a_range_beyond_the_schedule_is_named():
    with pytest.raises(UserError, match="timesteps 500 to before 2000: the model has 1000"):
        timestep_probabilities(LossSection(min_timestep=500, max_timestep=2000), 1000)
    with pytest.raises(UserError, match="timesteps 1000 to before 1000"):
        timestep_probabilities(LossSection(min_timestep=1000), 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_sampling": "importance"}, "go together"),
        ({"timestep_histogram": [1, 2]}, "go together"),
        ({"timestep_sampling": "importance", "timestep_histogram": [1, 0]}, "greater than 0"),
        ({"min_timestep": 5, "max_timestep": 5}, "max_timestep 5 must be above min_timestep 5"),
        ({"snr_gamma": 0}, "greater than 0"),
        ({"snr_gamma": float("inf")}, "finite"),
        ({"noise_offset": -0.1}, "greater than or equal to 0"),
        ({"multires_noise_discount": 1}, "less than 1"),
        ({"loss_type": "l1"}, "'l2' or 'huber'"),
        ({"snr_gama": 5}, "not permitted"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        LossSection(**options)


# --- noise -------------------------------------------------------------------------------------------------

SHAPE = (4, 3, 8, 12)


def test_without_options_noise_is_unit_noise():
    noise, input_noise = draw_noise(SHAPE, PLAIN, generator())
    assert torch.equal(noise, torch.randn(SHAPE, generator=generator()))
    assert torch.equal(noise, input_noise)


def test_offset_and_perturbation_are_those_of_diffusers_script():
    options = LossSection(noise_offset=0.1, input_perturbation=0.2)
    noise, input_noise = draw_noise(SHAPE, options, generator())
    rng = generator()
    expected = torch.randn(SHAPE, generator=rng)
    expected += 0.1 * torch.randn((4, 3, 1, 1), generator=rng)
    assert torch.equal(noise, expected)
    assert torch.equal(input_noise, expected + 0.2 * torch.randn(SHAPE, generator=rng))


@pytest.mark.parametrize("size", [(8, 12), (7, 5)])
def test_pyramid_noise_has_variance_1_at_every_pixel(size):
    count = 40_000
    noise = pyramid_noise((count, 1, *size), 0.7, generator())[:, 0].double()
    # count * variance is chi-square distributed; of some 100 pixels none is beyond 4.5 standard deviations.
    assert ((noise.square().mean(0) - 1).abs().max() / math.sqrt(2 / count)).item() < 4.5
    assert (noise.mean(0).abs().max() * math.sqrt(count)).item() < 4.5


def test_pyramid_noise_is_correlated_as_its_levels_are():
    """At 2 x 2 there is one coarser level, of one value: covariance d^2 / (1 + d^2) between all pixels."""
    noise = pyramid_noise((100_000, 1, 2, 2), 0.5, generator()).view(-1, 4).double()
    expected = torch.full((4, 4), 0.2, dtype=torch.float64).fill_diagonal_(1)
    assert ((noise.T.cov() - expected).abs().max()).item() < 0.015


def test_pyramid_noise_levels_are_bilinear():
    """The coarser level of 4 x 4, against interpolate: equal but for the scale of each pixel's variance."""
    noise = pyramid_noise((1, 1, 4, 4), 0.5, generator())
    rng = generator()
    fine, half, one = (torch.randn(1, 1, n, n, generator=rng) for n in (4, 2, 1))
    enlarged = torch.nn.functional.interpolate(half, size=(4, 4), mode="bilinear")
    rows = torch.tensor([1, 0.75, 0.25, 0]).square() + torch.tensor([0, 0.25, 0.75, 1]).square()
    enlarged = enlarged / (rows[:, None] * rows).sqrt()
    expected = (fine + 0.5 * enlarged + 0.25 * one) / math.sqrt(1 + 0.25 + 0.0625)
    torch.testing.assert_close(noise, expected)


# --- input and target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
def test_noisy_latents_are_diffusers(zero):
    x0, noise = torch.randn(2, 6, 4, 3, 3, generator=generator())
    t = torch.tensor([0, 1, 300, 700, 998, 999])
    theirs = DDPMScheduler.from_config(CONFIG, rescale_betas_zero_snr=zero).add_noise(x0, noise, t)
    torch.testing.assert_close(noisy_latents(x0, noise, t, levels(zero=zero)), theirs, rtol=2e-6, atol=1e-6)


def test_the_last_timestep_at_zero_terminal_snr_is_exact():
    last, (x0, noise) = torch.tensor([999, 999]), torch.randn(2, 2, 4, 3, 3, generator=generator())
    assert torch.equal(noisy_latents(1e6 * x0, noise, last, levels(zero=True)), noise)
    for prediction, expected in {"epsilon": noise, "v_prediction": -x0, "sample": x0}.items():
        target = training_target(x0, noise, last, levels(prediction, zero=True))
        torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-9)


def test_velocity_is_diffusers():
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=generator())
    t = torch.tensor([0, 1, 300, 700, 999])
    theirs = DDPMScheduler.from_config(CONFIG).get_velocity(x0, noise, t)
    ours = training_target(x0, noise, t, levels("v_prediction"))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


# --- loss --------------------------------------------------------------------------------------------------


def test_square_error_is_torchs_and_in_fp32():
    output, target = torch.randn(2, 3, 4, 5, 5, generator=generator())
    ours = pixel_losses(output, target, PLAIN).mean((1, 2))
    theirs = torch.nn.functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(ours, theirs)
    assert pixel_losses(1e3 * output.half(), target.half(), PLAIN).isfinite().all()  # 1e6 overflows fp16


def test_huber_is_its_formula_and_its_limits():
    errors = torch.tensor([0.0, 1e-4, 0.05, 0.1, 1, 30], dtype=torch.float64)

    def huber(c):
        zero = torch.zeros(6, 1, 1, 1)
        loss = pixel_losses(errors[:, None, None, None], zero, LossSection(loss_type="huber", huber_c=c))
        return loss.flatten().double()

    formula = 2 * 0.1 * ((errors**2 + 0.01).sqrt() - 0.1)
    torch.testing.assert_close(huber(0.1), formula, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(huber(1e4), errors**2, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(huber(1e-4)[-1], 2 * 1e-4 * errors[-1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", Prediction)
def test_min_snr_is_diffusers_formula(prediction, gamma):
    scheduler = DDPMScheduler.from_config(CONFIG)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    t = torch.arange(1000)
    snr = compute_snr(scheduler, t).double()  # fp32 inside
    least = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64))
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    ours = sample_weights(schedule(prediction), LossSection(snr_gamma=gamma))
    torch.testing.assert_close(ours, least / divisor, rtol=1e-6, atol=0)

    a = torch.linspace(1e-9, 1 - 1e-9, 10_001, dtype=torch.float64)
    snr = a / (1 - a)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction]
    exact = snr.clamp(max=gamma) / divisor
    torch.testing.assert_close(min_snr_weights(a, gamma, prediction), exact, rtol=1e-12, atol=0)


def test_min_snr_is_finite_and_exact_at_its_ends():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = {Prediction.EPSILON: [1, 0], Prediction.V: [0, 0], Prediction.SAMPLE: [0, 5]}
    for prediction, values in expected.items():
        assert min_snr_weights(ends, 5, prediction).tolist() == values
        near = torch.tensor([1e-15, 1 - 1e-15], dtype=torch.float64)
        assert min_snr_weights(near, 5, prediction).tolist() == pytest.approx(values, abs=1e-13)
    assert sample_weights(schedule("epsilon", zero=True), LossSection(snr_gamma=5))[999] == 1


def test_weights_multiply():
    options = LossSection(timestep_sampling="importance", timestep_histogram=(1, 3), snr_gamma=5)
    t = torch.arange(1000)
    min_snr = sample_weights(schedule(), LossSection(snr_gamma=5))
    product = min_snr / torch.tensor([0.5, 1.5])[t // 500]
    torch.testing.assert_close(sample_weights(schedule(), options), product)
    assert torch.equal(Levels(schedule(), options).weight, sample_weights(schedule(), options).float())
    assert torch.equal(Levels(schedule(), PLAIN).weight, torch.ones(1000))


def test_prior_preservation_is_dreambooths_sum():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert prior_preservation_loss(losses, 0.5) == 2 + 0.5 * 15
    with pytest.raises(RuntimeError):
        prior_preservation_loss(losses[:3], 0.5)
