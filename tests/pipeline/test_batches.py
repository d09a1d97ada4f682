"""Pictures drawn together are those drawn alone, in every family."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from family_inputs import INPUTS, error, latents, picture

import ldm

BIT_FOR_BIT = {
    "text": {},
    "image": {"image": picture(64, 64), "strength": 0.8},
}


@pytest.mark.parametrize("family", INPUTS)
def test_a_batch_equals_its_pictures_drawn_alone(models, family):
    """By a sampler that draws noise in its steps too; test_pipeline.py has the others."""
    pipe = models(family)
    common = {**INPUTS[family], "sampler": "dpmpp_sde"}
    batch = latents(pipe, num_images_per_prompt=2, seed=1, **common)
    alone = torch.cat([latents(pipe, seed=seed, **common) for seed in (1, 2)])
    assert error(batch, alone) < 1e-5
    assert error(batch[:1], batch[1:2]) > 1e-2


@pytest.mark.parametrize("family", ["sdxl", "inpaint_xl"])
def test_prompts_of_different_lengths_do_not_change_each_other(models, family):
    pipe, long = models(family), "the red boat at sea " * 5
    prompts, negatives = ["the red boat", long, "sea"], [None, "sea", "boat"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = latents(pipe, prompts, negative_prompt=negatives, seed=[4, 2, 9], **INPUTS[family])
        alone = [
            latents(pipe, prompt, negative_prompt=negative, seed=seed, **INPUTS[family])
            for prompt, negative, seed in zip(prompts, negatives, [4, 2, 9], strict=True)
        ]
    assert error(batch, torch.cat(alone)) < 1e-5


def test_given_latents_are_the_noise(models):
    pipe = models("sd1")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    common = {"image": picture(), "strength": 0.7, "sampler": "euler"}
    one, other = (latents(pipe, latents=noise, seed=seed, **common) for seed in (1, 2))
    assert error(one, other) < 0.5  # they still differ in the VAE's sample
    assert error(latents(pipe, latents=-noise, seed=1, **common), one) > 0.5


def test_a_threads_picture_is_its_own(models):
    """Image inputs, their noise and their encodings belong to a call."""
    pipe, common = models("inpaint_xl"), INPUTS["inpaint_xl"]
    one_by_one = [latents(pipe, seed=seed, **common) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: latents(pipe, seed=seed, **common), range(4)))
    assert all(error(a, b) < 1e-6 for a, b in zip(together, one_by_one, strict=True))


@pytest.mark.parametrize("given", BIT_FOR_BIT.values(), ids=BIT_FOR_BIT)
def test_on_a_cpu_it_equals_them_bit_for_bit(given):
    """The embedded model is wide enough for its products to add up in other orders, if they may.

    So may those of a few rows without guidance, shared among threads: there they differ in the last bits.
    """
    pipe = ldm.load(device="cpu", dtype="fp32")
    common = {"num_inference_steps": 2, "height": 64, "width": 64, **given}
    prompts = ["a red boat", "two houses in the snow", "the sea"]
    batch = latents(pipe, prompts, seed=1, **common)
    alone = [latents(pipe, text, seed=1 + k, **common) for k, text in enumerate(prompts)]
    assert torch.equal(batch, torch.cat(alone))
    assert torch.equal(pipe.decode(batch), torch.cat([pipe.decode(each) for each in alone]))
