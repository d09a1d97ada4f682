"""Fixed and learned variance: steps and bound against diffusers' DDPMScheduler; guidance."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion.bound import bound
from ldm.diffusion.bounds import Bounds
from ldm.diffusion.forward import interpolated_log_variance, sigma_log_variances, sigma_posterior
from ldm.diffusion.guidance import CFG, InstructPix2Pix
from ldm.diffusion.methods.ancestral import ancestral, ddpm
from ldm.diffusion.noise import Noise
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import PURE_NOISE, Denoised, step_log_variance
from ldm.diffusion.variance import LearnedVariance
from ldm.errors import UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
STRIDED = [999, 980, 600, 300, 41, 3]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, X0, GUESS, V = (draw(2, 4, 3, 3, seed=k) for k in range(4))


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def schedule(kind="fixed_small", **changes):
    return Schedule.from_config({"_class_name": "DDPMScheduler", **SD, "variance_type": kind, **changes})


def theirs(kind, steps=None, timesteps=None, **changes):
    """A DDPMScheduler that computes in float64 on its own fp32 table."""
    found = DDPMScheduler(**SD, clip_sample=False, variance_type=kind, **changes)
    found.set_timesteps(steps, timesteps=timesteps)
    found.alphas_cumprod, found.one = found.alphas_cumprod.double(), f64(1.0)
    return found


def says(v=V, x0=GUESS):
    """A denoiser of constants, which has learned its variance."""

    def denoise(x, sigma):
        def log_variance(sigma_next):
            return interpolated_log_variance(v, *sigma_log_variances(sigma, sigma_next))

        return Denoised(x0.to(x), log_variance=log_variance)

    return denoise


# --- a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_diffusers(kind, zero):
    """Its mean and its noise, on strides of any length, from pure noise too; in the space of each."""
    peer = theirs(kind, timesteps=STRIDED, prediction_type="sample", rescale_betas_zero_snr=zero)
    ours = schedule(kind, rescale_betas_zero_snr=zero)
    for t, s in pairwise(STRIDED):
        levels = ours.sigma(f64([t, s]))
        output = torch.cat([GUESS, V], dim=1) if kind == "learned_range" else GUESS
        at_t, at_s = 1 / torch.sqrt(1 + levels**2)
        wanted = peer.step(output, t, X, generator=torch.Generator().manual_seed(5)).prev_sample
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (step,) = ddpm(says(), X / at_t, levels, lambda *_, same=noise: same, variance=ours.variance)
        assert torch.allclose(step.x * at_s, wanted, rtol=1e-6, atol=1e-7), (t, s)


@pytest.mark.parametrize("sigma", [14.0, 1.3, PURE_NOISE])
def test_the_fixed_variances_are_the_two_limits(sigma):
    """Of x_0 that is a point, and of x_0 that is unit noise: p(x' | x) there in closed form, in float64."""
    sigma, sigma_next = f64(sigma), f64(0.7)
    small, large = (
        step_log_variance(Denoised(X0), sigma, sigma_next, kind).exp()
        for kind in ("fixed_small", "fixed_large")
    )
    assert torch.allclose(small, sigma_posterior(X0, X, sigma, sigma_next).log_variance.exp(), rtol=1e-12)
    # Var(x' | x) = Var(x') - Cov(x', x)^2 / Var(x), x' = x_0 + 0.7 noise, x_0 of variance 1.
    wanted = 1 + sigma_next**2 - (1 + sigma_next**2) ** 2 / (1 + sigma**2)
    assert torch.allclose(large, wanted, rtol=1e-12)
    middle = step_log_variance(says(torch.zeros_like(V))(X, sigma), sigma, sigma_next, None)
    assert torch.allclose(middle, (small.log() + large.log()) / 2, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:the run starts")
@pytest.mark.parametrize("spacing", ["trailing", "karras", "leading"])
def test_fixed_small_is_ancestral_to_the_last_bit(spacing):
    """So that pictures drawn by DDPM before it had other variances are drawn again equal."""
    grid = schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction").grid(12, spacing, "ddpm")
    x = (X * grid.initial_scale).float()

    def denoise(x, sigma):
        return Denoised(torch.tanh(x / float(sigma**2 + 1) ** 0.5) * 0.7)

    for variance in ("fixed_small", None):
        drawn = ddpm(denoise, x, grid.sigmas, Noise([1, 2]), variance=variance)
        for ours, before in zip(drawn, ancestral(denoise, x, grid.sigmas, Noise([1, 2])), strict=True):
            assert torch.equal(ours.x, before.x)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_from_pure_noise_to_zero_all_is_finite_and_ends_at_x0(variance):
    sigmas = f64([PURE_NOISE, 80.0, 1.0, 1e-4, 0.0])
    steps = list(ddpm(says(), X.float() * PURE_NOISE, sigmas, Noise([0, 1]), variance=variance))
    assert all(step.x.isfinite().all() and step.x.dtype == torch.float32 for step in steps)
    assert torch.equal(steps[-1].x, GUESS.float())


def test_none_is_the_learned_variance_where_there_is_one():
    sigmas = f64([3.0, 1.0])
    plain = {
        kind: next(ddpm(says(), X, sigmas, Noise([0, 1]), variance=kind)).x
        for kind in (None, "learned_range", "fixed_small")
    }
    assert torch.equal(plain[None], plain["learned_range"])
    assert not torch.equal(plain[None], plain["fixed_small"])
    with pytest.raises(UserError, match="learned_range needs a model that has learned it"):
        list(ddpm(lambda x, sigma: Denoised(GUESS), X, sigmas, Noise([0, 1]), variance="learned_range"))


# --- the bound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
def test_steps_of_the_bound_are_those_of_diffusers(kind):
    """KL by torch of two Gaussians of diffusers' means and variances, in the variance-preserving space."""
    peer, ours = theirs(kind, timesteps=STRIDED, prediction_type="sample"), schedule(kind)
    posterior = theirs("fixed_small", timesteps=STRIDED, prediction_type="sample")
    sigmas = ours.sigma(f64(STRIDED))
    noise = Noise([3, 4])
    _, *terms, _ = bound(says(), X0, sigmas, Noise([3, 4]), variance=ours.variance)
    for t, sigma, term in zip(STRIDED[:-1], sigmas[:-1], terms, strict=True):
        x = (X0 + sigma * noise(X0, 0, 0)) / torch.sqrt(1 + sigma**2)
        means = [_mean(posterior, x0, t, x) for x0 in (X0, GUESS)]
        variance = peer._get_variance(t, predicted_variance=V)
        variance = variance.exp() if kind == "learned_range" else variance.expand_as(X0)
        q = torch.distributions.Normal(means[0], posterior._get_variance(t).sqrt())
        p = torch.distributions.Normal(means[1], variance.sqrt())
        wanted = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
        assert torch.allclose(term.nats, wanted, rtol=1e-5), t


def _mean(peer, x0, t, x):
    """Of diffusers' step: what is left when its noise is 0."""
    ends = [peer.step(x0, t, x, generator=torch.Generator().manual_seed(k)).prev_sample for k in (0, 0)]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(*ends)
    return ends[0] - peer._get_variance(t).sqrt() * noise


def test_the_best_variance_is_the_true_one():
    """Of N(0, s^2) data the bound is least, among all v, where p has the true variance of x' given x."""
    s2, sigma, sigma_next = f64(0.5), f64(3.0), f64(1.0)
    x0 = s2.sqrt() * draw(4000, 1, 1, 1)
    truth = (s2 + sigma_next**2) - (s2 + sigma_next**2) ** 2 / (s2 + sigma**2)
    lower, upper = sigma_log_variances(sigma, sigma_next)
    best = 2 * (truth.log() - lower) / (upper - lower) - 1
    assert -1 < best < 1
    nats = {
        change: _step_nats(s2, x0, torch.stack([sigma, sigma_next]), float(best) + change)
        for change in (-0.2, 0.0, 0.2)
    }
    assert nats[0.0] < min(nats[-0.2], nats[0.2]) - 1e-4


def _step_nats(s2, x0, sigmas, v):
    def denoise(x, sigma):
        return says(torch.full_like(x, v), s2 / (s2 + sigma**2) * x)(x, sigma)

    terms = {term.name: term.nats.mean() for term in bound(denoise, x0, sigmas, Noise(range(len(x0))))}
    return float(terms["step"])


# --- guidance --------------------------------------------------------------------------------------------

OUTPUTS = {name: draw(2, 8, 3, 3, seed=10 + k) for k, name in enumerate(("cond", "uncond", "image"))}


def predict(x, sigma, branches):
    return {name: OUTPUTS[name] for name in branches}


def means(x, sigma, branches):
    return {name: OUTPUTS[name][:, :4] for name in branches}


@pytest.mark.parametrize("guidance", [CFG(1.0), CFG(7.0), CFG(7.0, 0.7), InstructPix2Pix(7.0, 1.5)])
def test_guidance_mixes_the_mean_and_the_variance_is_conds(guidance):
    sigma, sigma_next = f64(3.0), f64(1.0)
    d = LearnedVariance(guidance)(predict, Prediction.V.x0)(X, sigma)
    plain = guidance(means, Prediction.V.x0)(X, sigma)
    assert torch.equal(d.x0, plain.x0)
    assert plain.log_variance is None
    v = OUTPUTS["cond"][:, 4:]
    wanted = interpolated_log_variance(v, *sigma_log_variances(sigma, sigma_next))
    assert torch.equal(d.log_variance(sigma_next), wanted)
    assert torch.equal(
        Bounds(clip_sample=True).around(lambda *_: d, False)(X, sigma).log_variance(sigma_next), wanted
    )


def test_a_guidance_keeps_its_state_and_its_anchor():
    """It is made once a picture, not once a step; what else it gives is kept."""
    calls = []

    def own(predict, to_x0):
        calls.append("made")

        def denoise(x, sigma):
            outputs = predict(x, sigma, ("cond", "uncond"))
            assert all(output.shape == x.shape for output in outputs.values())
            return Denoised(outputs["cond"], outputs["uncond"])

        return denoise

    denoise = LearnedVariance(own)(predict, None)
    for _ in range(2):
        d = denoise(X, f64(2.0))
    assert calls == ["made"]
    assert torch.equal(d.anchor, OUTPUTS["uncond"][:, :4])
    assert d.log_variance is not None


def test_without_the_branch_cond_there_is_no_variance():
    def own(predict, to_x0):
        return lambda x, sigma: Denoised(predict(x, sigma, ("uncond",))["uncond"])

    denoise = LearnedVariance(own)(predict, None)
    assert denoise(X, f64(2.0)).log_variance is None
    with pytest.raises(UserError, match="a guidance that asks for the branch cond"):
        list(ddpm(denoise, X, f64([2.0, 1.0]), Noise([0, 1]), variance="learned_range"))


# --- configs ---------------------------------------------------------------------------------------------


def test_the_config_says_the_variance():
    meant = {kind: schedule(kind).variance for kind in (*KINDS, None)}
    assert meant == {
        "fixed_small": "fixed_small",
        "fixed_small_log": "fixed_small",
        "fixed_large": "fixed_large",
        "learned_range": "learned_range",
        None: "fixed_small",
    }
    assert [name for name, sampler in SAMPLERS.items() if sampler.takes_variance] == ["ddpm"]
    for refused in ("fixed_large_log", "learned"):
        with pytest.raises(
            UserError, match=f"variance_type='{refused}' is not supported; one of fixed_small"
        ):
            schedule(refused)
    assert math.isnan(float(theirs("fixed_large_log", 10)._get_variance(500) ** 0.5)), "why it is refused"
