"""The embedded model: of the size promised, open to diffusers, and the same picture there and here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import ldm

WEIGHTS = Path(__file__).parents[2] / "weights"
PROMPT = "a red sailboat on a calm sea at sunset"


@pytest.fixture(scope="module")
def pipe():
    return ldm.load(device="cpu", dtype="fp32")


def test_sizes():
    for folder, limit in (("postcard", 40), ("postcard-eval", 16)):
        size = sum(path.stat().st_size for path in (WEIGHTS / folder).rglob("*") if path.is_file())
        assert size <= limit * 2**20, f"{folder} has {size / 2**20:.1f} MiB"


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
