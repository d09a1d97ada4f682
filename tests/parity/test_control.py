"""Drawing with control pictures, against diffusers' pipelines of the same tiny random weights, in fp32."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import randomise

import ldm

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
HINT = {"conditioning_embedding_out_channels": (4, 8)}  # the tiny VAE halves pictures once
STEPS = 4
TEXT = "the red boat"


def picture(seed=1, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def control_of(unet, seed, cls=diffusers.ControlNetModel, **changes):
    """A ControlNet for a U-Net, all of whose weights are random, small enough to steer and not to drown it."""
    torch.manual_seed(seed)
    return randomise(cls.from_unet(unet, **HINT | changes)).eval()


@pytest.fixture(scope="module")
def sd1(families):
    return families("sd1")


@pytest.fixture(scope="module")
def models_of(families):
    """Our pipelines by family."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = ldm.load(families(name)[0], device="cpu", dtype="fp32")
        return made[name]

    return get


@pytest.fixture(scope="module")
def nets(sd1, tmp_path_factory):
    """Two ControlNets of sd1, as diffusers' modules and as folders."""
    root, found = tmp_path_factory.mktemp("controls"), []
    for seed in (1, 2):
        net = control_of(sd1[1].unet, seed)
        net.save_pretrained(root / str(seed))
        found.append((net, str(root / str(seed))))
    return found


def peer_of(peer, name, **more):
    parts = {part: getattr(peer, part) for part in PARTS} | more
    if "XL" in name:
        parts |= {part: getattr(peer, part) for part in ("text_encoder_2", "tokenizer_2")}
        parts["add_watermarker"] = False
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = getattr(diffusers, name)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipe, **arguments):
    return pipe(
        TEXT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5), output_type="latent", **arguments
    ).images


def ours(pipe, **arguments):
    return pipe(TEXT, num_inference_steps=STEPS, seed=5, output_type="latent", **arguments).images


def error(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("fields", "called"),
    [
        ({}, {}),
        ({"scale": 0.4}, {"controlnet_conditioning_scale": 0.4}),
        ({"start": 0.25, "end": 0.75}, {"control_guidance_start": 0.25, "control_guidance_end": 0.75}),
        ({"mode": "guess", "scale": 0.7}, {"guess_mode": True, "controlnet_conditioning_scale": 0.7}),
    ],
    ids=["plain", "strength", "start and end", "guess mode"],
)
def test_a_controlnet(sd1, nets, models_of, fields, called):
    peer = peer_of(sd1[1], "StableDiffusionControlNetPipeline", controlnet=nets[0][0])
    expected = theirs(peer, image=picture(), guidance_scale=4.0, **called)
    pipe = models_of("sd1")
    use = {"model": nets[0][1], "image": picture(), **fields}
    assert error(ours(pipe, control=[use], guidance_scale=4.0), expected) < 1e-4
    by_names = ours(pipe.with_controlnet(nets[0][1]), control_image=picture(), guidance_scale=4.0, **called)
    assert error(by_names, expected) < 1e-4
    assert error(ours(pipe, guidance_scale=4.0), expected) > 1e-3
