"""A card is told of all steps before the first is done: nothing in the loop makes the host wait for it."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from family_inputs import INPUTS, mask, picture

import ldm
from ldm.pipeline import networks
from ldm.pipeline.sample import sample

CALL = {"prompt": "the red boat", "num_inference_steps": 5, "seed": 5}
SAMPLERS = ["ddim", "ddpm", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lms", "lcm", "sa_solver"]
WAYS = {
    "image": {"image": picture(), "strength": 0.9},
    "mask": {"image": picture(), "mask_image": mask(), "strength": 0.9},
    "composed": {"prompt": "the red boat AND sea :0.7"},
    "caching": {"cache_interval": 2},
    "merging": {"token_merging_ratio": 0.5},
    "tiles": {"height": 48, "width": 80, "tile_size": 32},
}


@pytest.fixture(scope="module")
def on(families, device):
    made = {}

    def get(name):
        if name not in made:
            made[name] = ldm.load(families(name)[0], device=device, dtype="fp16")
        return made[name]

    return get


def drawn_without_waiting(pipe, monkeypatch, **arguments):
    """Latents; from the first call of the U-Net on, torch raises where the host would wait."""
    unet = networks._unet

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        return unet(*args)

    def job_of(job, batch):
        unread = []
        *_, last = sample(job, batch, unread)
        torch.cuda.set_sync_debug_mode("default")
        assert bool(torch.stack(unread).all())
        return last.x * job.grid.final_scale

    monkeypatch.setattr(networks, "_unet", watched)
    monkeypatch.setattr("ldm.pipeline.drawing.draw_latents", lambda job, batch, on_step: job_of(job, batch))
    try:
        return pipe(**CALL | arguments, output_type="latent").images
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_waits(on, card, monkeypatch, sampler):
    expected = on("sd1")(**CALL, sampler=sampler, output_type="latent").images
    assert torch.equal(drawn_without_waiting(on("sd1"), monkeypatch, sampler=sampler), expected)


@pytest.mark.parametrize("family", [*INPUTS, "sd2_v"])
def test_no_family_does(on, card, monkeypatch, family):
    drawn_without_waiting(on(family), monkeypatch, **INPUTS.get(family, {}))


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_drawing_does(on, card, monkeypatch, way):
    drawn_without_waiting(on("sd1"), monkeypatch, **WAYS[way])


# --- what overflows ---------------------------------------------------------------------------------------


def overflowing(pipe, from_call):
    """The pipeline with a U-Net that gives Inf in 16 bits from a call on, as one that overflows would."""
    unet, calls = copy.deepcopy(pipe.unet), []

    def overflow(module, _, output):
        calls.append(output.dtype)
        return output * (torch.inf if output.dtype is not torch.float32 and len(calls) >= from_call else 1)

    unet.conv_out.register_forward_hook(overflow)
    return ldm.Pipeline.from_parts(replace(pipe.parts, unet=unet), pipe.runtime), calls


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
@pytest.mark.parametrize("given", ["a seed", "a generator"])
def test_what_overflows_is_drawn_again_as_if_each_answer_had_been_read(on, device, sampler, given):
    """The callback reads each: its picture is the right one."""

    def call():
        drawing = CALL | {"sampler": sampler, "output_type": "latent"}
        if given == "a generator":
            drawing |= {"seed": None, "generator": torch.Generator().manual_seed(5)}
        return drawing

    pipe, calls = overflowing(on("sd1"), 1)
    with pytest.warns(UserWarning, match="the U-Net gave NaN or Inf in float16: done again in float32"):
        read = pipe(**call(), callback_on_step_end=lambda *_: {}).images
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        calls.clear()
        ahead = pipe(**call()).images
    assert len([each for each in told if "done again in float32" in str(each.message)]) == 1
    assert torch.equal(ahead, read)
    assert ahead.isfinite().all()
    on_card = device.type == "cuda"
    assert len(calls) == 5 + 1 + on_card * 5  # on a card all of them first


def test_whoever_looks_at_steps_sees_finite_ones(on, device):
    pipe, _ = overflowing(on("sd1"), 3)
    seen = []
    with pytest.warns(UserWarning, match="done again in float32"):
        pipe(**CALL, output_type="latent", callback_on_step_end=lambda _, i, t, told: seen.append(told) or {})
    assert all(each["latents"].isfinite().all() for each in seen)
    assert len(seen) == 5
