"""Masks with models that know of none, against diffusers' pipelines of the same tiny weights, in fp32."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from family_inputs import mask, picture
from tiny_families import BETAS, make_family
from tiny_pipeline import make_folder

import ldm

COMMON = {"prompt": "the red boat", "image": picture(), "mask_image": mask(), "output_type": "latent"}
TO_FIRST_LEVEL = {"set_alpha_to_one": False}
SCHEDULERS = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", TO_FIRST_LEVEL),
    ("DDPMScheduler", {}),
    ("PNDMScheduler", TO_FIRST_LEVEL | {"skip_prk_steps": True}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("LCMScheduler", {}),
]
# PNDM from an image is another one there: docs/samplers.md.
CASES = [
    (*case, strength)
    for case in SCHEDULERS
    for strength in (1.0, 0.6)
    if (case[0], strength) != ("PNDMScheduler", 0.6)
]


def generator():
    return torch.Generator().manual_seed(5)


def error(ours, theirs):
    ours, theirs = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(theirs))
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def peer_of(pipe, name, **changes):
    peer = getattr(diffusers, name)(**pipe.components | changes)
    peer.set_progress_bar_config(disable=True)
    return peer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked") / "model"
    return make_folder(folder), ldm.load(folder, dtype="fp32", device="cpu")


@pytest.mark.parametrize(("scheduler", "options", "strength"), CASES)
def test_any_text_to_image_model_fills_a_mask_as_in_diffusers(model, scheduler, options, strength):
    theirs, ours = model
    steps_offset = {"steps_offset": 1} if scheduler != "DPMSolverSinglestepScheduler" else {}
    made = getattr(diffusers, scheduler)(**BETAS, **steps_offset, **options)
    if "clip_sample" in made.config:
        made.register_to_config(clip_sample=False)
    peer = peer_of(theirs, "StableDiffusionInpaintPipeline", scheduler=made, requires_safety_checker=False)
    config = {**made.config, "_class_name": scheduler}
    pipe = ldm.Pipeline.from_parts(replace(ours.parts, scheduler=config))
    call = COMMON | {"num_inference_steps": 6, "strength": strength, "guidance_scale": 4.0}
    assert error(pipe(**call, seed=5).images, peer(**call, generator=generator()).images) < 1e-4


def test_so_do_models_of_xl(tmp_path):
    theirs = make_family("sdxl", tmp_path / "model")
    peer = peer_of(theirs, "StableDiffusionXLInpaintPipeline")
    pipe = ldm.load(tmp_path / "model", dtype="fp32", device="cpu")
    call = COMMON | {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16}
    for strength in (1.0, 0.5):
        call["strength"] = strength
        assert error(pipe(**call, seed=5).images, peer(**call, generator=generator()).images) < 1e-4
