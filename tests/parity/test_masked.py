"""Masks with models that know of none, against diffusers' pipelines of the same tiny weights, in fp32."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from family_inputs import mask, picture
from PIL import Image
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


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
@pytest.mark.parametrize("blur", [0, 2])
def test_only_the_part_around_a_mask_is_drawn_as_in_diffusers(tmp_path, family, blur):
    """Picture and mask are larger than what is drawn, and of another shape."""
    theirs = make_family(family, tmp_path / "model")
    made = diffusers.DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False)
    peer = peer_of(theirs, "StableDiffusionInpaintPipeline", scheduler=made, requires_safety_checker=False)
    pipe = ldm.load(tmp_path / "model", dtype="fp32", device="cpu")
    pipe = ldm.Pipeline.from_parts(
        replace(pipe.parts, scheduler={**made.config, "_class_name": "DDIMScheduler"})
    )
    photo, hidden = picture(48, 64), Image.new("L", (64, 48))
    hidden.paste(255, (30, 10, 40, 18))
    call = {"image": photo, "mask_image": hidden, "padding_mask_crop": 3, "height": 16, "width": 16}
    call |= {"prompt": "the red boat", "num_inference_steps": 3, "strength": 0.7, "output_type": "pil"}
    soft = peer.mask_processor.blur(hidden, blur_factor=blur) if blur else hidden
    (want,) = peer(**call | {"mask_image": soft}, generator=generator()).images
    (ours,) = pipe(**call, mask_blur=blur, seed=5).images
    levels = np.abs(np.asarray(ours, dtype=int) - np.asarray(want, dtype=int))
    assert ours.size == (64, 48)
    assert levels.max() <= 2  # 8 bits, rounded twice
    assert not levels[np.asarray(soft) == 0].any()
    assert levels.mean() < 0.05


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_soft_mask_is_differential_diffusion(model, scheduler):
    """Against its loop as Levin and Fried publish it, over diffusers' scheduler and our network's answers."""
    theirs, ours = model
    made = getattr(diffusers, scheduler)(**BETAS, steps_offset=1)
    if "clip_sample" in made.config:
        made.register_to_config(clip_sample=False)
    pipe = ldm.Pipeline.from_parts(replace(ours.parts, scheduler={**made.config, "_class_name": scheduler}))
    # Levels that no step's threshold equals: there the paper's code and its text differ.
    levels = np.linspace(10, 250, 16, dtype=np.uint8)[None].repeat(16, 0)
    steps, strength = 8, 0.75
    call = COMMON | {"mask_image": Image.fromarray(levels), "num_inference_steps": steps}
    found = pipe(**call, strength=strength, guidance_scale=1.0, soft_mask=True, seed=5).images

    made.set_timesteps(steps)
    timesteps = made.timesteps[-int(steps * strength) :]
    draws = generator()
    x0 = pipe.encode(torch.from_numpy(np.array(picture())).movedim(-1, 0)[None].float() / 255)
    x0 = x0.sample(torch.randn(x0.mean.shape, generator=draws))
    noise = torch.randn(x0.shape, generator=draws)
    torch.randn(x0.shape, generator=draws)  # diffusers' sample of the masked picture
    strengths = torch.from_numpy(levels[None, None].astype(np.float32) / 255)
    strengths = torch.nn.functional.interpolate(strengths, x0.shape[-2:])
    known = [made.add_noise(x0, noise, t[None]) for t in timesteps]
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(steps - len(timesteps))
    tokens = pipe.text.encode(["the red boat"]).tokens
    state = known[0]
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            kept = 1 - strengths > i / len(timesteps)
            state = torch.where(kept, known[i], state)
            out = theirs.unet(made.scale_model_input(state, t), t, encoder_hidden_states=tokens).sample
            state = made.step(out, t, state).prev_sample
    assert error(found, state) < 1e-4
