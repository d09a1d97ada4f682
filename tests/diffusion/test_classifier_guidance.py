"""Classifier guidance, against Bayes' rule on exact mixtures and guided-diffusion's formulas."""

import pytest
import torch
from mixture import LINE, PLANE, Mixture

from ldm.diffusion.guidance import CFG, ClassifierGuidance
from ldm.diffusion.methods.churned import heun
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.solvers import PURE_NOISE, Denoised

SIGMAS = [0.05, 0.5, 2.0, 20.0]


def exact_gradient(mixture, k):
    """Of log p(component k | x, sigma)."""

    def gradient(x, sigma):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(mixture._logits(x, sigma).log_softmax(1)[:, k].sum(), x)[0]

    return gradient


def guided(mixture, k, scale=1.0):
    """The mixture's denoiser, guided by its exact classifier."""

    def network(x, sigma, branches):
        return {"cond": mixture.denoise(x, sigma).x0}

    return ClassifierGuidance(CFG(1.0), exact_gradient(mixture, k), scale)(network, Prediction.SAMPLE.x0)


def component(mixture, k):
    return Mixture([1.0], [mixture.means[k].tolist()], [float(mixture.variances[k])])


def states(mixture, sigma):
    x = mixture.sample(40, seed=1)
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("sigma", [*SIGMAS, PURE_NOISE])
@pytest.mark.parametrize("mixture", [LINE, PLANE], ids=["line", "plane"])
def test_scale_1_is_bayes_rule(mixture, sigma, k):
    """At pure noise, too: there x0 moves from the mean of all to that of the class."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    x = states(mixture, sigma)
    got, want = guided(mixture, k)(x, sigma).x0, component(mixture, k).denoise(x, sigma).x0
    error = float((got - want).abs().max() / want.abs().max())
    assert error < (1e-12 if sigma < 1e9 else 1e-5)  # x = 1e10 leaves six digits of 1 in float64
    assert float((mixture.denoise(x, sigma).x0 - want).abs().max()) > 0.1 or sigma < 0.1


@pytest.mark.parametrize("k", [0, 1])
def test_samples_are_those_of_the_class(k):
    """A Gaussian's flow has a closed form: noise z ends at mean + std (z - mean) / sqrt(std^2 + sigma^2)."""
    highest = 30.0
    z = highest * torch.randn(64, 1, 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sigmas = torch.cat([torch.logspace(1.4772, -2, 120, dtype=torch.float64), torch.zeros(1)])
    sigmas[0] = highest
    *_, last = heun(guided(PLANE, k), z, sigmas, None)
    mean, variance = PLANE.means[k], PLANE.variances[k]
    want = mean + variance.sqrt() * (z - mean) / (variance + highest**2).sqrt()
    assert float((last.x - want).abs().max()) < 2e-3
    *_, plain = heun(PLANE.denoise, z, sigmas, None)
    assert float((plain.x - want).abs().max()) > 1


def test_a_larger_scale_goes_deeper_into_the_class():
    """Samples of p(x) p(k | x)^scale have the class more surely: log p(k | x) rises with the scale."""
    z = 30 * torch.randn(256, 1, 1, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sigmas = torch.cat([torch.logspace(1.4772, -2, 60, dtype=torch.float64), torch.zeros(1)])
    sure = []
    for scale in (0.0, 1.0, 3.0):
        *_, last = heun(guided(LINE, 1, scale), z, sigmas, None)
        sure.append(float(LINE._logits(last.x, torch.tensor(0.0)).log_softmax(1)[:, 1].mean()))
    assert sure[0] < sure[1] - 0.5
    assert sure[1] < sure[2] - 0.01


def in_vp_space(a, k):
    """(x, the network's eps, the gradient in x: guided-diffusion's cond_fn) in DDPM's space at a."""
    sigma = ((1 - a) / a).sqrt()
    x = a.sqrt() * states(PLANE, sigma)
    eps = (x / a.sqrt() - PLANE.denoise(x / a.sqrt(), sigma).x0) / sigma
    with torch.enable_grad():
        own = x.detach().requires_grad_()
        log_p = PLANE._logits(own / a.sqrt(), sigma).log_softmax(1)[:, k]
        grad = torch.autograd.grad(log_p.sum(), own)[0]
    return x, eps, grad


A_T, A_S = torch.tensor(0.35, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)


def one_step(scale, sampler, noise=None):
    sigmas = torch.stack([((1 - a) / a).sqrt() for a in (A_T, A_S)])
    x, _, _ = in_vp_space(A_T, 1)
    solver = SAMPLERS[sampler].solver
    (step,) = solver(guided(PLANE, 1, scale), x / A_T.sqrt(), sigmas, noise)
    return A_S.sqrt() * step.x


def test_a_ddim_step_is_guided_diffusion_s():
    """Its condition_score, then ddim_sample with eta 0: Dhariwal and Nichol 2021, algorithm 2."""
    x, eps, grad = in_vp_space(A_T, 1)
    eps = eps - (1 - A_T).sqrt() * (2.5 * grad)
    pred_xstart = (x - (1 - A_T).sqrt() * eps) / A_T.sqrt()
    want = A_S.sqrt() * pred_xstart + (1 - A_S).sqrt() * eps
    assert torch.allclose(one_step(2.5, "ddim"), want, rtol=1e-12)


def test_a_ddpm_step_s_mean_moves_by_its_variance_times_the_gradient():
    """condition_mean, ``mean + variance * grad`` with variance beta: Dhariwal and Nichol 2021, algorithm 1.

    It is of first order in beta: exactly it is ``beta / sqrt(alpha)``, as the mean itself is scaled by.
    """

    def no_noise(like, sigma, sigma_next):
        return torch.zeros_like(like)

    _, _, grad = in_vp_space(A_T, 1)
    alpha = A_T / A_S
    moved = one_step(2.5, "ddpm", no_noise) - one_step(0.0, "ddpm", no_noise)
    assert torch.allclose(moved, (1 - alpha) / alpha.sqrt() * 2.5 * grad, rtol=1e-10)


def test_an_anchor_and_a_learned_variance_are_kept():
    """As CFG++ anchors: the noise estimate of the unconditional x0 gains the same shift."""
    x, sigma = states(PLANE, 1.0), torch.tensor(1.0, dtype=torch.float64)
    uncond, cond, log_variance = x / 2, x / 3, torch.zeros_like(x)
    gradient = exact_gradient(PLANE, 0)

    def base(predict, to_x0):
        return lambda x, sigma: Denoised(cond, uncond, log_variance)

    got = ClassifierGuidance(base, gradient, 2.0)(None, None)(x, sigma)
    shift = 2 * gradient(x, sigma)
    assert torch.allclose(got.x0, cond + shift, rtol=1e-12)
    assert torch.allclose(got.anchor, uncond + shift, rtol=1e-12)
    assert got.log_variance is log_variance
