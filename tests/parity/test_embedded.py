"""The embedded model: of the size promised, open to diffusers, and the same picture there and here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionUpscalePipeline
from PIL import Image

import ldm
from ldm.postcards.comparisons.upscaling import measure_upscaler
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.sources import rendered

WEIGHTS = Path(__file__).parents[2] / "weights"
PROMPT = "a red sailboat on a calm sea at sunset"


@pytest.fixture(scope="module")
def pipe():
    return ldm.load(device="cpu", dtype="fp32")


def test_sizes():
    for folders, limit in ((["postcard", "postcard-upscaler"], 40), (["postcard-eval"], 16)):
        files = [path for folder in folders for path in (WEIGHTS / folder).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        assert size <= limit * 2**20, f"{' and '.join(folders)} have {size / 2**20:.2f} MiB"


@pytest.mark.parametrize("steps", [2, 10])
def test_diffusers_draws_the_same_picture(pipe, steps):
    peer = StableDiffusionPipeline.from_pretrained(WEIGHTS / "postcard", torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    common = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "np"}
    theirs = peer(PROMPT, generator=generator, **common).images
    sampler = type(peer.scheduler).__name__  # ours may default to another
    ours = pipe(PROMPT, seed=3, sampler=sampler, spacing="trailing", **common).images
    assert np.abs(ours - theirs).max() < 1e-3


def test_its_pictures_hold_what_the_prompt_says(pipe):
    """A broken model or sampler does not draw a red sunset, a blue day and a dark night."""
    sunset, day, night = pipe(
        ["the sea at sunset", "the sea on a clear day", "the sea at night"], seed=0, output_type="np"
    ).images
    red, blue = (lambda image, c=c: image[10:50, :, c].mean() for c in (0, 2))
    assert red(sunset) > red(day)
    assert red(sunset) > blue(sunset)
    assert blue(day) > red(day)
    assert night.mean() < 0.6 * day.mean()


def test_words_it_has_not_seen(pipe):
    assert pipe.unknown_words("a red zebra on a xylophone") == ["zebra", "xylophone"]


# --- the upscaler ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upscaler():
    return ldm.load("postcard-upscaler", device="cpu", dtype="fp32")


@pytest.mark.parametrize(("noise_level", "steps"), [(0, 1), (20, 2)])
def test_diffusers_enlarges_to_the_same_picture(upscaler, noise_level, steps):
    peer = StableDiffusionUpscalePipeline.from_pretrained(
        WEIGHTS / "postcard-upscaler", torch_dtype=torch.float32
    )
    peer.set_progress_bar_config(disable=True)
    small = Image.fromarray(rendered(evaluation_prompts(1), 64)[0])
    common = {"num_inference_steps": steps, "guidance_scale": 1.0, "noise_level": noise_level}
    generator = torch.Generator().manual_seed(3)
    latents = peer("", small, generator=generator, output_type="latent", **common).images
    with torch.no_grad():  # its own decoding is for AutoencoderKL only
        decoded = peer.vae.decode(latents / peer.vae.config.scaling_factor).sample
    theirs = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    ours = upscaler("", image=small, seed=3, output_type="np", **common).images
    assert ours.shape == (1, 128, 128, 3)
    assert np.abs(ours - theirs).max() < 1e-3


def test_it_comes_nearer_to_large_renders_than_bicubic(pipe, upscaler):
    found, _ = measure_upscaler(upscaler, pipe, evaluation_prompts(4, held_out=True), [1])
    assert found["renders"]["1 step"].gain > 2
    assert found["through the VAE"]["1 step"].gain > 0
