"""Likelihoods of pictures through a pipeline: against diffusers' own networks, a mixture, and Bayes."""

import math
import types

import numpy as np
import pytest
import torch
from mixture import Mixture
from PIL import Image

import ldm
from ldm.diffusion.likelihood import Likelihood
from ldm.diffusion.noise import Noise
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.evaluate import likelihood
from ldm.evaluate.likelihood import (
    CONTENT,
    content_errors,
    denoising_bounds,
    ends,
    fit,
    log_likelihoods,
    posterior,
    under,
)
from ldm.evaluate.outliers import robust_scores
from ldm.models.kind import Kind

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULER |= {"beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


def picture(pipe, seed=0):
    height, width = likelihood.own_size(pipe)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Two prompts, each with a density of its own over two numbers.
CLASSES = {
    "left": Mixture([0.5, 0.5], [[-1.0, 0.3], [-0.4, -0.5]], [0.3, 0.2]),
    "right": Mixture([0.7, 0.3], [[0.5, 0.0], [-0.3, 0.8]], [0.3, 0.4]),
}


@pytest.fixture
def exact(monkeypatch):
    """A pipeline whose networks know the true densities; its pictures are latents [1, 1, 1, 2]."""
    schedule = Schedule.from_config(SCHEDULER | {"rescale_betas_zero_snr": True})
    vae = types.SimpleNamespace(latent_channels=1, downscale=8)

    def known(pipe, prompts, size, steps=None):
        groups = []
        for i, prompt in enumerate(prompts):
            groups.append(likelihood.Under([i], CLASSES[prompt].denoise))
        return None, groups

    monkeypatch.setattr(likelihood, "under", known)
    return types.SimpleNamespace(schedule=schedule, vae=vae, device=torch.device("cpu"), kind=Kind.TEXT)


def state(x, seed, low):
    """The z of a latent x that a seed gives."""
    noise = Noise([seed])
    shape = tuple(x.shape[1:])
    noise.initial(shape)
    return x.double() + low * noise.initial(shape).double()


@pytest.mark.parametrize("seed", [0, 3])
def test_bayes_rule_by_likelihood(exact, seed):
    """With the true denoiser, the chances of the prompts are those of Bayes' rule."""
    x = CLASSES["left"].sample(1, seed)
    found = log_likelihoods(exact, x, list(CLASSES), seed=seed, trace="exact", rtol=1e-4)
    low, _ = ends(exact.schedule)
    z = state(x, seed, low)
    logs = [float(each.log_prob(z, low)) for each in CLASSES.values()]
    assert [each.nats for each in found] == pytest.approx(logs, abs=0.01)
    truth = 1 / (1 + math.exp(logs[1] - logs[0]))
    assert posterior(found)[0] == pytest.approx(truth, abs=0.01)


def test_bayes_rule_by_denoising_error(exact):
    """The integral of the error is the log likelihood: in the mean, for it is a bound that is met."""
    x = torch.tensor([[[[-0.2, 0.1]]]])
    found = denoising_bounds(exact, x, list(CLASSES), levels=16, noises=100)
    low, _ = ends(exact.schedule)
    # -log p(z) in the mean over z's noise.
    z = x.double() + low * torch.randn(20000, 1, 1, 2, dtype=torch.float64)
    logs = [float(each.log_prob(z, low).mean()) for each in CLASSES.values()]
    for one, truth in zip(found, logs, strict=True):
        assert one.std_error < 0.3
        assert abs(one.nats - truth) < 4 * one.std_error
    gain, error = found[0].gain_over(found[1])
    assert error < found[0].std_error  # paired
    assert abs(gain - (logs[0] - logs[1])) < 4 * error
    assert posterior(found)[0] == pytest.approx(1 / (1 + math.exp(logs[1] - logs[0])), abs=0.15)


def test_the_contents_error_in_closed_form(exact, monkeypatch):
    """Of N(0, v): E |noise - estimate|^2 = (1 - s)^2 x^2 / sigma^2 + s^2, with s = v / (v + sigma^2)."""
    v, x = 0.8, torch.linspace(-2, 2, 500).reshape(1, 1, 1, 500)
    monkeypatch.setitem(CLASSES, "wide", Mixture([1.0], [[0.0] * 500], [v]))
    found = np.mean([content_errors(exact, x, ["wide"], seed=seed, levels=8) for seed in range(40)])
    u = np.linspace(*np.log(CONTENT), 2001)
    s = v / (v + np.exp(2 * u))
    error = (1 - s) ** 2 * float(x.square().sum()) / np.exp(2 * u) + 500 * s**2
    assert found == pytest.approx(np.trapezoid(error, u), rel=0.02)


def test_the_standard_error_covers():
    """Estimates of known mean: 95 % of intervals of two standard errors hold it."""
    generator = np.random.default_rng(0)
    held, gains_held = 0, 0
    for _ in range(400):
        shared = generator.normal(0, 10, 30)
        a = Likelihood(tuple(5 + shared + generator.normal(size=30)), 1, 1)
        b = Likelihood(tuple(3 + shared + generator.normal(size=30)), 1, 1)
        held += abs(a.nats - 5) < 2 * a.std_error
        gain, error = a.gain_over(b)
        gains_held += abs(gain - 2) < 2 * error
        assert error < a.std_error / 2
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert gains_held / 400 == pytest.approx(0.95, abs=0.03)


def test_the_error_is_that_of_diffusers_networks(pipe, tiny_folder):
    """One level and one noise, by diffusers' U-Net, VAE and text encoder, each written out."""
    from diffusers import StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, feature_extractor=None)
    image = picture(pipe)
    prompts = ["the red boat", ""]
    found = denoising_bounds(pipe, image, prompts, seed=5, levels=1, noises=1)
    low, high = ends(pipe.schedule)
    noise = Noise([5])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        encoded = peer.vae.encode(pixels).latent_dist
        z = (encoded.mean + encoded.std * noise.initial(tuple(encoded.mean.shape[1:]))) * 0.18215
        shift = float(torch.rand(1, generator=noise.generators[0]))
        sigma = low * (high / low) ** shift
        eps = noise.initial(tuple(z.shape[1:]))
        t = float(pipe.schedule.t(sigma))
        for prompt, one in zip(prompts, found, strict=True):
            tokens, _ = peer.encode_prompt(prompt, "cpu", 1, False)
            out = peer.unet((z + sigma * eps) / (1 + sigma**2) ** 0.5, t, tokens).sample
            error = math.log(high / low) * float((out - eps).double().square().sum())
            prior = 0.5 * float(z.double().square().sum() + z.numel() * high**2) / (1 + high**2)
            prior += z.numel() / 2 * (math.log1p(high**-2) - 1)
            entropy = z.numel() / 2 * math.log(2 * math.pi * math.e * low**2)
            assert one.nats == pytest.approx(-(error + prior + entropy), rel=1e-4)
            assert (one.evaluations, one.dims, one.std_error) == (1, z.numel(), math.inf)


def test_the_pipelines_denoiser_is_differentiated(pipe, tiny_folder):
    """v^T J v through the pipeline is that of diffusers' U-Net, in a step of Hutchinson's."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    _, (group,) = under(pipe, ["the red boat"], (16, 16))
    x, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(0.7, dtype=torch.float64)
    tokens = pipe.text.encode(["the red boat"]).tokens

    def theirs(x):
        t = float(pipe.schedule.t(sigma))
        return x - sigma.float() * unet(x / (1 + sigma.float() ** 2) ** 0.5, t, tokens).sample

    with torch.enable_grad():
        x.requires_grad_()
        ours, peers = group.denoise(x, sigma).x0, theirs(x)
        (a,), (b,) = (torch.autograd.grad(out, x, v) for out in (ours, peers))
    assert float((a * v).sum()) == pytest.approx(float((b * v).sum()), rel=1e-4)
    assert not group.denoise(x.detach(), sigma).x0.requires_grad


def test_prompts_share_what_is_random(pipe, monkeypatch):
    monkeypatch.setattr(likelihood, "ends", lambda schedule: (0.5, 1.0))  # few steps
    latents = 0.5 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    one, same, other = log_likelihoods(pipe, latents, ["a boat", "a boat", "the sea"], rtol=0.1, seed=1)
    assert one == same != other
    assert 0 < one.gain_over(other)[1] < one.std_error


def test_long_prompts_beside_short_ones(pipe):
    """Each prompt is read as it is alone, whatever it is asked beside."""
    image, prompts = picture(pipe), ["the red boat", "the sea " * 40, ""]
    together = denoising_bounds(pipe, image, prompts, levels=2, noises=1)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = denoising_bounds(pipe, image, [prompt], levels=2, noises=1)
        assert found.nats == pytest.approx(alone.nats, rel=1e-5)


def test_pictures_are_fitted_by_their_middle():
    wide = Image.new("RGB", (40, 10))
    wide.paste("white", (15, 0, 25, 10))
    assert fit(wide, (10, 10)).min() == 1
    assert fit(Image.new("LA", (8, 8), (0, 0)), (4, 4)).min() == 1  # transparent: on white


def test_zero_terminal_snr_ends_below_infinity():
    schedule = Schedule.from_config(SCHEDULER | {"rescale_betas_zero_snr": True})
    low, high = ends(schedule)
    assert low == float(schedule.sigma(0))
    assert high == float(schedule.sigma(998)) < 1e5
    assert ends(Schedule.from_config(SCHEDULER))[1] == float(schedule.from_config(SCHEDULER).sigma(999))


def test_what_has_no_likelihood(pipe):
    with pytest.raises(UserError, match=r"latents \[1, 3, 2, 2\] are not allowed: give \[1, 4, h, w\]"):
        log_likelihoods(pipe, torch.zeros(1, 3, 2, 2), [""])
    with pytest.raises(UserError, match="NaN or Inf"):
        denoising_bounds(pipe, torch.full((1, 4, 2, 2), math.nan), [""])


@pytest.mark.parametrize("family", ["inpaint", "pix2pix"])
def test_models_that_need_more_than_a_text(families, family):
    pipe = ldm.load(families(family)[0], device="cpu", dtype="fp32")
    with pytest.raises(UserError, match="does not draw from text alone"):
        denoising_bounds(pipe, picture(pipe), [""])


def test_robust_scores():
    values = [*np.random.default_rng(0).normal(7, 2, 999), 1e6]
    scores = robust_scores(values)
    assert np.abs(scores[:-1] - (np.array(values[:-1]) - 7) / 2).max() < 0.3
    assert scores[-1] > 1e5
    assert robust_scores([1.0, 1.0, 1.0, 2.0]).tolist() == [0, 0, 0, math.inf]


def test_marks_in_a_caption_are_text(pipe):
    """As in training: a caption with AND is one text."""
    captions = ["red boat AND sea", "(red boat:1.5)"]
    found = denoising_bounds(pipe, picture(pipe), captions, levels=2, noises=1)
    assert len(found) == 2
    assert found[0].nats != found[1].nats
    _, groups = under(pipe, captions, likelihood.own_size(pipe))
    assert [row for group in groups for row in group.rows] == [0, 1]
