"""Pictures of a drawing on its way."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ldm
from ldm.pipeline import preview
from ldm.pipeline.preview import decoder, fit, linear, samples
from ldm.request import Request


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


def test_a_small_decoder_decodes_itself(pipe):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decoder(pipe)(latents), pipe.decode(latents))


def test_the_map_of_a_linear_vae_is_its_own(monkeypatch):
    """z = A mean(rgb) + b of each patch, with a fourth channel that says nothing new."""
    turn = torch.tensor([[1.0, 2, 0], [0, 1, -1], [2, 0, 1], [1, 1, 1]], dtype=torch.float64)
    shift = torch.tensor([0.5, -1, 0, 3], dtype=torch.float64)

    def encode(vae, images):
        patches = F.avg_pool2d(images.double(), 8)
        return SimpleNamespace(mean=torch.einsum("ck,bkhw->bchw", turn, patches) + shift.view(4, 1, 1))

    monkeypatch.setattr(preview.networks, "encode", encode)
    weight = fit(None)
    images = samples()[:2]
    shown = linear(encode(None, images).mean.float(), weight)
    assert weight.shape == (3, 5)
    assert (shown - F.avg_pool2d(images, 8)).abs().max() < 2e-3


def test_what_is_fitted_is_always_the_same_and_has_every_scale_and_colour():
    images = samples()
    assert torch.equal(images, samples())
    assert images.shape == (8, 3, 128, 128)
    assert images.min() < 0.05
    assert images.max() > 0.95
    flat = images.movedim(1, -1).reshape(-1, 3)
    assert torch.corrcoef(flat.T).fill_diagonal_(0).abs().max() < 0.3
    for size in (4, 16, 64):
        assert F.avg_pool2d(images, size).std() > 0.05


def test_the_embedded_model_is_seen_through_the_map(monkeypatch):
    """Of finished pictures the map explains most of what differs from pixel to pixel."""
    pipe = ldm.load("postcard", device="cpu")
    drawn = pipe.generate(
        Request(prompt="a red boat on the sea", num_inference_steps=4, seeds=(1, 2)), None, "latent"
    )
    truth = F.interpolate(pipe.decode(drawn.images), drawn.images.shape[-2:], mode="area")
    monkeypatch.setattr(preview, "SMALL_DECODER", 0)
    shown = decoder(pipe)(drawn.images)
    assert shown.shape == truth.shape
    left = (shown - truth).square().mean() / (truth - truth.mean((0, 2, 3), keepdim=True)).square().mean()
    assert left < 0.25
    assert np.isfinite(float(left))
    assert not math.isclose(float(left), 0)
