"""The forward process against diffusers' DDPMScheduler, sums in float64, and one space against the other."""

import pytest
import torch
from diffusers import DDPMScheduler
from mixture import LINE, PLANE

from ldm.diffusion.forward import (
    Gaussian,
    interpolated_log_variance,
    log_variances,
    posterior,
    q_sample,
    q_step,
    score,
    sigma_posterior,
    snr,
)
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.scheduler_config import noise_levels

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = [
    {"beta_schedule": "linear"},
    SD,
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {**SD, "rescale_betas_zero_snr": True},
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: "-".join(map(str, config.values())))
def test_schedules_are_diffusers(config):
    ours = noise_levels({"_class_name": "DDPMScheduler", **config})
    assert torch.equal(ours.float(), DDPMScheduler(**config).alphas_cumprod)


def test_noising_is_diffusers_add_noise():
    theirs = DDPMScheduler(**SD)
    a, t = noise_levels({"_class_name": "DDPMScheduler", **SD}), torch.tensor([0, 500, 999])
    x0, noise = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    ours = q_sample(x0, noise, a[t].view(-1, 1, 1, 1))
    assert torch.allclose(ours, theirs.add_noise(x0, noise, t), rtol=1e-6)


def test_single_steps_add_up_to_one_jump():
    """The mean and the variance of t steps are those of q(x_t | x_0), in numbers."""
    betas = torch.linspace(1e-3, 0.2, 12, dtype=torch.float64)
    a = torch.cumprod(1 - betas, 0)
    signal, variance = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for k, beta in enumerate(betas):
        signal = q_step(signal, zero, beta)
        variance = q_step(variance.sqrt(), zero, beta) ** 2 + q_step(zero, one, beta) ** 2
        assert float(signal) == pytest.approx(float(q_sample(one, zero, a[k])), rel=1e-12)
        assert float(variance) == pytest.approx(float(q_sample(zero, one, a[k])) ** 2, rel=1e-12)


@pytest.mark.parametrize("steps", [1000, 10])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
def test_mean_and_variance_are_diffusers(steps, kind):
    theirs = DDPMScheduler(**SD, variance_type=kind, clip_sample=False)
    theirs.set_timesteps(steps)
    a = noise_levels({"_class_name": "DDPMScheduler", **SD})
    x0, x, v = draw(1, 4, 2, 2), draw(1, 4, 2, 2, seed=1), draw(1, 4, 2, 2, seed=2).clamp(-1, 1)
    for t, s in zip(theirs.timesteps.tolist(), [*theirs.timesteps.tolist()[1:], -1], strict=True):
        a_t, a_s = a[t], a[s] if s >= 0 else torch.ones((), dtype=torch.float64)
        lower, upper = log_variances(a_t, a_s)
        ours = {
            "fixed_small": lower,
            "fixed_large": upper,
            "learned_range": interpolated_log_variance(v, lower, upper),
        }
        # Of learned_range diffusers gives the log.
        wanted = theirs._get_variance(t, predicted_variance=v)
        wanted = wanted if kind == "learned_range" else wanted.log()
        assert torch.allclose(ours[kind], wanted.double(), rtol=1e-5, atol=2e-3), (t, s)
        if s < 0:
            continue
        alpha, beta = a_t / a_s, 1 - a_t / a_s
        mean = (a_s.sqrt() * beta * x0 + alpha.sqrt() * (1 - a_s) * x) / (1 - a_t)
        assert torch.allclose(posterior(x0, x, a_t, a_s).mean, mean, rtol=1e-12)


def test_both_spaces_have_one_posterior():
    a = noise_levels({"_class_name": "DDPMScheduler", **SD})
    a_t, a_s = a[700], a[400]
    sigma_t, sigma_s = ((1 - each) / each for each in (a_t, a_s))
    sigma_t, sigma_s = sigma_t.sqrt(), sigma_s.sqrt()
    x0, x = draw(1, 1, 1, 5), draw(1, 1, 1, 5, seed=1)
    here = posterior(x0, x, a_t, a_s)
    there = sigma_posterior(x0, x / a_t.sqrt(), sigma_t, sigma_s)
    assert torch.allclose(here.mean / a_s.sqrt(), there.mean, rtol=1e-12)
    assert torch.allclose(here.log_variance - a_s.log(), there.log_variance, rtol=1e-12)


def test_kl_of_two_posteriors_is_the_difference_of_snr():
    """Kingma et al. 2021, equation 13."""
    sigma, sigma_next = torch.tensor(3.0, dtype=torch.float64), torch.tensor(1.2, dtype=torch.float64)
    x0, guess, x = draw(1, 1, 1, 6), draw(1, 1, 1, 6, seed=1), draw(1, 1, 1, 6, seed=2)
    kl = sigma_posterior(x0, x, sigma, sigma_next).kl(sigma_posterior(guess, x, sigma, sigma_next))
    wanted = 0.5 * (snr(sigma_next) - snr(sigma)) * (x0 - guess) ** 2
    assert torch.allclose(kl, wanted, rtol=1e-12)


def test_gaussians_are_torchs():
    p, q = (Gaussian(draw(7, seed=k), draw(7, seed=k + 1)) for k in (0, 5))
    theirs = [torch.distributions.Normal(each.mean, (each.log_variance / 2).exp()) for each in (p, q)]
    assert torch.allclose(p.kl(q), torch.distributions.kl_divergence(*theirs), rtol=1e-12)
    assert torch.allclose(p.log_prob(q.mean), theirs[0].log_prob(q.mean), rtol=1e-12)


@pytest.mark.parametrize("mixture", [LINE, PLANE])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_the_score_is_the_gradient_of_the_log_density(mixture, sigma):
    x = (mixture.sample(50) * 2).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x, sigma).sum(), x)
    level = torch.tensor(sigma, dtype=torch.float64)
    ours = score(mixture.denoise(x, level).x0, x, level)
    assert (ours - gradient).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("prediction", list(Prediction))
def test_the_score_from_each_kind_of_output(prediction):
    """Of eps it is -eps / sigma; v and x0 say the same."""
    x0, eps = draw(1, 4, 3, 3), draw(1, 4, 3, 3, seed=1)
    sigma = torch.tensor(2.5, dtype=torch.float64)
    output = prediction.target(x0, eps, sigma)
    guess = prediction.x0(output, x0 + sigma * eps, sigma)
    assert torch.allclose(score(guess, x0 + sigma * eps, sigma), -eps / sigma, rtol=1e-9)


WEIGHTS = {"epsilon": lambda s: s, "v_prediction": lambda s: s * (s**2 + 1).sqrt(), "sample": lambda s: s**2}


@pytest.mark.parametrize("prediction", list(Prediction))
def test_training_matches_the_score_of_noising(prediction):
    """The error of each kind of output is that of its score, against ``-noise / sigma``, times a weight.

    Denoising score matching is what training does: the weight is sigma of eps, sigma sqrt(sigma^2 + 1) of v,
    sigma^2 of x0.
    """
    x0, noise, output = draw(1, 4, 3, 3), draw(1, 4, 3, 3, seed=1), draw(1, 4, 3, 3, seed=2)
    sigma = torch.tensor(1.7, dtype=torch.float64)
    x = x0 + sigma * noise
    learnt = score(prediction.x0(output, x, sigma), x, sigma)
    wanted = WEIGHTS[prediction](sigma) * (learnt + noise / sigma)
    assert torch.allclose((output - prediction.target(x0, noise, sigma)).abs(), wanted.abs(), rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.3, 1.5, 8.0])
def test_the_best_denoiser_has_the_score(sigma):
    """Vincent 2011, in numbers: E |s + noise / sigma|^2 and E |s - score|^2 differ by the same for every s.

    So the first, which needs no density, is least where the second is 0; by quadrature over x_0 and x.
    """
    x0 = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    x = torch.linspace(-6 - 9 * sigma, 6 + 9 * sigma, 2001, dtype=torch.float64)
    level = torch.tensor(sigma, dtype=torch.float64)
    kernel = torch.distributions.Normal(x0[:, None], level).log_prob(x)  # [x_0, x]
    joint = (LINE.log_prob(x0.view(-1, 1, 1, 1))[:, None] + kernel).exp()
    joint = joint / joint.sum()
    taught = (x0[:, None] - x) / level**2  # -noise / sigma
    exact = score(LINE.denoise(x.view(-1, 1, 1, 1), level).x0, x.view(-1, 1, 1, 1), level).flatten()
    seen = joint.sum(0) > 1e-12
    assert torch.allclose(((joint * taught).sum(0) / joint.sum(0))[seen], exact[seen], atol=1e-6)

    def gap(s):
        return (joint * ((s - taught) ** 2 - (s - exact) ** 2)).sum()

    others = [gap(s) for s in (exact, torch.zeros_like(x), torch.tanh(x), -x / (1 + level**2))]
    assert torch.allclose(torch.stack(others), others[0].expand(4), rtol=1e-6)
