"""The classifier of noisy latents: its gradient, its noise levels, whose latents it knows."""

import pytest
import torch
from conftest import TINY_TAESD, randomise_
from tiny_classifier import CLASSES, tiny_classifier

from ldm.diffusion.solvers import PURE_NOISE
from ldm.errors import UserError
from ldm.models import AutoencoderKL, AutoencoderTiny, LatentClassifier, build
from ldm.models.classifier import fingerprint, same_latents
from ldm.pipeline.networks import class_gradient


def level(sigma):
    return torch.tensor(sigma, dtype=torch.float64)


@pytest.fixture(scope="module")
def vae():
    return randomise_(AutoencoderTiny.from_config(TINY_TAESD))


@pytest.fixture(scope="module")
def classifier(vae):
    return tiny_classifier(vae).double().requires_grad_(False)


def state(sigma, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(count, 4, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0 + sigma * noise


@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0, 200.0])
def test_the_gradient_is_that_of_the_state_in_sigma_space(classifier, sigma):
    """Central differences of log p along a direction: the input's scaling is in the chain rule."""
    x, along = state(sigma), state(0.0, seed=9)
    gradient = class_gradient(classifier, 1)(x, level(sigma))
    h = 1e-5 * max(1, sigma)

    def log_p(x):
        return classifier(x, level(sigma)).log_softmax(1)[:, 1]

    slope = (log_p(x + h * along) - log_p(x - h * along)) / (2 * h)
    assert torch.allclose((gradient * along).sum((1, 2, 3)), slope, rtol=1e-5, atol=1e-9)


def test_guidance_is_finite_at_pure_noise_and_its_limit(vae):
    """sigma^2 times the gradient, in fp32 as it is drawn, at noise of 1e5 and at what stands for infinity."""
    plain = tiny_classifier(vae).requires_grad_(False)
    noise = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    shifts = [sigma**2 * class_gradient(plain, 0)(sigma * noise, level(sigma)) for sigma in (1e5, PURE_NOISE)]
    assert 1e-4 < float(shifts[0].abs().max()) < 100
    assert torch.allclose(*shifts, rtol=0, atol=1e-2 * float(shifts[0].abs().max()))


def test_rows_are_on_their_own_and_have_levels_of_their_own(classifier):
    x = state(2.0, count=3)
    together = classifier(x, level([0.1, 2.0, 30.0]))
    assert together.shape == (3, len(CLASSES))
    for i, sigma in enumerate((0.1, 2.0, 30.0)):
        assert torch.allclose(classifier(x[i : i + 1], level(sigma)), together[i : i + 1], rtol=1e-9)
    assert not torch.allclose(classifier(x, level(0.1)), classifier(x, level(2.0)))


def test_drawing_in_inference_mode_has_gradients(classifier):
    want = class_gradient(classifier, 2)(state(1.0), level(1.0))
    with torch.inference_mode():
        got = class_gradient(classifier, 2)(state(1.0), level(1.0))
    assert torch.equal(got, want)


def test_nan_is_refused(classifier):
    x = state(1.0)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the classifier gives NaN or Inf"):
        class_gradient(classifier, 0)(x, level(1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_are_the_same_in_other_dtypes_and_with_another_decoder(vae, dtype):
    own, other = fingerprint(vae), AutoencoderTiny.from_config(TINY_TAESD)
    other.load_state_dict(vae.state_dict())
    randomise_(other.decoder, seed=5)
    assert same_latents(own, fingerprint(other.to(dtype)))


def test_latents_of_another_encoder_or_scaling_are_others(vae):
    own = fingerprint(vae)
    assert not same_latents(own, fingerprint(randomise_(AutoencoderTiny.from_config(TINY_TAESD), seed=1)))
    assert not same_latents(own, (0.18215, *own[1:]))
    assert not same_latents(own, own[:-1])
    kl = AutoencoderKL.from_config({"block_out_channels": [8], "norm_num_groups": 4})
    assert not same_latents(own, fingerprint(kl))


def test_its_config_is_read_and_written(classifier):
    again = build(classifier.to_config())
    assert isinstance(again, LatentClassifier)
    assert again.config == classifier.config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": ["boat"]}, "classes must be at least two names, each once"),
        ({"classes": ["boat", "boat"]}, "classes must be at least two names, each once"),
        ({"norm_num_groups": 3}, r"norm_num_groups = 3 does not divide block_out_channels \[8, 16\]"),
        ({"widths": [8]}, r"unknown key widths = \[8\]"),
        ({"vae": "abc"}, "vae = 'abc'"),
    ],
)
def test_a_wrong_config_is_one_line(classifier, change, said):
    with pytest.raises(UserError, match=said):
        build(classifier.to_config() | change)
