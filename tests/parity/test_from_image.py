"""Pictures begun from an image, against diffusers' pipelines of the same tiny random weights, in fp32."""

import copy
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import BETAS, FAMILIES, XL, make_family
from tiny_pipeline import make_folder, randomise, tiny_vae

import ldm
from ldm.pipeline.deciding.before import align_your_steps

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
IMAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((9, 16), 255, dtype=np.uint8), ((7, 0), (0, 0))))
COMMON = {"prompt": "the red boat", "image": IMAGE, "output_type": "latent"}


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def error(ours, theirs):
    ours, theirs = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(theirs))
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_parts(peer, name, **changes):
    """diffusers' pipeline of that class, of the parts of another."""
    parts = {part: getattr(peer, part) for part in PARTS} | changes
    return quiet(getattr(diffusers, name)(**parts, requires_safety_checker=False))


def with_scheduler(pipe, scheduler):
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    return ldm.Pipeline.from_parts(replace(pipe.parts, scheduler=config))


def load(folder):
    return ldm.load(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lcm") / "model"
    peer = make_family("lcm", folder)
    return with_parts(peer, "LatentConsistencyModelImg2ImgPipeline"), load(folder)


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl") / "model"
    return make_folder(folder), load(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """With AutoencoderTiny, whose latents of a picture are no sample."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return make_folder(folder, "tiny"), load(folder)


def of_version_1(pipe, image, **fields):
    """Latents of a request that an old PNG holds."""
    asked = ldm.Request(prompt=COMMON["prompt"], seeds=(5,), image=str(image), **fields)
    request = pipe.resolve(asked)
    old = ldm.Request.from_json(request.to_json().replace('"version": 4', '"version": 1'))
    assert old.version == 1
    return pipe.generate(old, output_type="latent").images, pipe.prepare(old)


@pytest.fixture
def image_file(tmp_path):
    IMAGE.save(tmp_path / "image.png")
    return tmp_path / "image.png"


# --- latent consistency models ------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.8), (1, 0.8), (3, 0.5), (2, 0.05), (4, 1.0)])
def test_an_lcm_makes_all_its_steps_within_the_strength(lcm, steps, strength):
    peer, pipe = lcm
    call = COMMON | {"num_inference_steps": steps, "strength": strength}
    assert error(pipe(**call, seed=5).images, peer(**call, generator=generator()).images) < 1e-5


def test_a_list_for_an_lcm_is_cut(lcm):
    peer, pipe = lcm
    call = COMMON | {"timesteps": [999, 799, 399, 99], "strength": 0.5}
    assert error(pipe(**call, seed=5).images, peer(**call, generator=generator()).images) < 1e-5


def test_other_models_with_lcm_steps_make_the_last_ones(kl):
    """As diffusers' pipeline for an image does with an LCM-LoRA's scheduler."""
    peer, pipe = kl
    scheduler = diffusers.LCMScheduler(**BETAS)
    img2img = with_parts(peer, "StableDiffusionImg2ImgPipeline", scheduler=scheduler)
    call = COMMON | {"num_inference_steps": 4, "strength": 0.8}
    got = with_scheduler(pipe, scheduler)(**call, seed=5).images
    assert error(got, img2img(**call, generator=generator()).images) < 1e-5


def test_an_lcm_of_xl_makes_the_last_steps(tmp_path, monkeypatch):
    """For these diffusers has no pipeline but that of every XL."""
    lcm_xl = replace(FAMILIES["sdxl"], unet=XL | {"time_cond_proj_dim": 16}, scheduler="LCMScheduler")
    monkeypatch.setitem(FAMILIES, "lcm_xl", replace(lcm_xl, schedule=BETAS))
    peer = make_family("lcm_xl", tmp_path / "model")
    img2img = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(peer))
    call = COMMON | {"num_inference_steps": 4, "strength": 0.8, "guidance_scale": 3.0}
    got = load(tmp_path / "model")(**call, seed=5).images
    assert error(got, img2img(**call, generator=generator()).images) < 1e-4


def test_an_lcm_with_more_steps_than_timesteps(lcm):
    with pytest.raises(ldm.UserError, match=r"6 steps: the lcm spacing has at most 5 at strength 0\.1"):
        lcm[1](**COMMON, num_inference_steps=6, strength=0.1)
    with pytest.raises(ldm.UserError, match="at most 0 at strength 0"):
        lcm[1](**COMMON, num_inference_steps=6, strength=0.0)


def test_an_old_picture_of_an_lcm(lcm, image_file):
    peer, pipe = lcm
    latents, _ = of_version_1(pipe, image_file, num_inference_steps=4, strength=0.8)
    call = COMMON | {"timesteps": [759, 499, 259], "strength": 1.0}
    assert error(latents, peer(**call, generator=generator()).images) < 1e-5


# --- a VAE that gives no distribution -----------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_no_noise_is_drawn_for_the_latents_of_a_tiny_vae(tiny, scheduler, strength):
    peer, pipe = tiny
    scheduler = getattr(diffusers, scheduler)(**BETAS, steps_offset=1)
    scheduler.register_to_config(clip_sample=False)
    img2img = with_parts(peer, "StableDiffusionImg2ImgPipeline", scheduler=scheduler)
    call = COMMON | {"num_inference_steps": 5, "strength": strength}
    got = with_scheduler(pipe, scheduler)(**call, seed=5).images
    assert error(got, img2img(**call, generator=generator()).images) < 1e-4


def test_image_k_of_a_batch_with_a_tiny_vae_is_the_image_alone(tiny):
    call = COMMON | {"num_inference_steps": 3, "strength": 0.7}
    together = tiny[1](**call, seed=[5, 9], num_images_per_prompt=2).images
    assert together.shape == (2, 4, 8, 8)
    assert error(together[1:], tiny[1](**call, seed=9).images) < 1e-4


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_a_tiny_vae(tmp_path, strength):
    peer = make_family("inpaint", tmp_path / "kl")
    peer = with_parts(peer, "StableDiffusionInpaintPipeline", vae=randomise(tiny_vae("tiny"), 0.5))
    peer.save_pretrained(tmp_path / "model")
    call = COMMON | {"mask_image": MASK, "num_inference_steps": 4, "strength": strength, "eta": 0.7}
    got = load(tmp_path / "model")(**call, seed=5).images
    assert error(got, peer(**call, generator=generator()).images) < 1e-4


def test_an_old_picture_of_a_tiny_vae(tiny, image_file):
    """Its seed gave noise for the VAE too: diffusers' picture after one more draw."""
    peer, pipe = tiny
    latents, _ = of_version_1(pipe, image_file, num_inference_steps=5, strength=0.6)
    drawn = generator()
    torch.randn(1, 4, 8, 8, generator=drawn)
    img2img = with_parts(peer, "StableDiffusionImg2ImgPipeline")
    call = COMMON | {"num_inference_steps": 5, "strength": 0.6}
    assert error(latents, img2img(**call, generator=drawn).images) < 1e-4


# --- solvers that look at the whole grid --------------------------------------------------------------------

SIGMA_MIN = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize(
    ("scheduler", "options", "steps", "strength"),
    [
        ("DPMSolverSinglestepScheduler", {}, 10, 0.7),
        ("DPMSolverSinglestepScheduler", {}, 9, 0.65),
        ("DPMSolverSinglestepScheduler", SIGMA_MIN, 10, 0.5),
        ("DPMSolverMultistepScheduler", SIGMA_MIN, 20, 0.3),
        ("UniPCMultistepScheduler", SIGMA_MIN | {"lower_order_final": False}, 8, 0.5),
    ],
)
def test_a_run_from_an_image_goes_on_with_the_whole_grid(kl, scheduler, options, steps, strength):
    peer, pipe = kl
    scheduler = getattr(diffusers, scheduler)(**BETAS, **options)
    img2img = with_parts(peer, "StableDiffusionImg2ImgPipeline", scheduler=scheduler)
    call = COMMON | {"num_inference_steps": steps, "strength": strength}
    own = with_scheduler(pipe, scheduler)
    assert error(own(**call, seed=5).images, img2img(**call, generator=generator()).images) < 1e-4


def test_old_pictures_have_orders_of_their_own(kl, image_file):
    """DPM++ 2S began its pairs where the run began: as on a grid of those steps alone."""
    pipe = kl[1]
    fields = {"sampler": "dpmpp_2s", "num_inference_steps": 10, "strength": 0.7}
    latents, job = of_version_1(pipe, image_file, **fields)
    rest = job.grid.timesteps.tolist()
    alone = pipe(**COMMON, sampler="dpmpp_2s", timesteps=rest, strength=1.0, seed=5).images
    assert len(rest) == 7
    assert torch.equal(latents, alone)
    assert error(latents, pipe(**COMMON, **fields, seed=5).images) > 1e-3


def test_bounds_reach_the_picture(lcm, kl):
    clipping = diffusers.LCMScheduler(**BETAS, clip_sample=True, clip_sample_range=0.8)
    thresholding = diffusers.DPMSolverMultistepScheduler(**BETAS, thresholding=True, sample_max_value=2.0)
    for (peer, pipe), name, scheduler in (
        (lcm, "LatentConsistencyModelImg2ImgPipeline", clipping),
        (kl, "StableDiffusionImg2ImgPipeline", thresholding),
    ):
        img2img = with_parts(peer, name, scheduler=scheduler)
        call = COMMON | {"num_inference_steps": 5, "strength": 0.8}
        got = with_scheduler(pipe, scheduler)(**call, seed=5).images
        assert got.abs().max() < 1.01
        assert error(got, img2img(**call, generator=generator()).images) < 1e-4


def test_clipping_is_taken_for_a_mistake_where_diffusers_does_so(kl):
    peer, pipe = kl
    scheduler = diffusers.DDIMScheduler(**BETAS, steps_offset=1, clip_sample=True)
    with pytest.warns(UserWarning, match="clip_sample=True is for pixels, and ignored as in diffusers"):
        own = with_scheduler(pipe, scheduler)
    img2img = with_parts(peer, "StableDiffusionImg2ImgPipeline", scheduler=scheduler)
    assert not scheduler.config.clip_sample  # its pipelines for Stable Diffusion 1 and 2 turn it off
    call = COMMON | {"num_inference_steps": 5, "strength": 0.8}
    assert error(own(**call, seed=5).images, img2img(**call, generator=generator()).images) < 1e-4


# --- Align Your Steps ---------------------------------------------------------------------------------------


def test_xl_has_its_own_list(tmp_path, kl):
    make_family("sdxl", tmp_path / "model")
    for pipe, name in (
        (load(tmp_path / "model"), "StableDiffusionXLTimesteps"),
        (kl[1], "StableDiffusionTimesteps"),
    ):
        listed = diffusers.schedulers.AysSchedules[name]
        job = pipe.prepare(ldm.Request(sampler="euler", spacing="ays", num_inference_steps=10))
        assert job.grid.timesteps.tolist() == listed
        old = pipe.prepare(ldm.Request(sampler="euler", spacing="ays", num_inference_steps=20, version=1))
        assert old.grid.timesteps[:4].tolist() == [999, 924.5, 850, 793]
        assert old.grid.initial_scale == pytest.approx(float(old.grid.sigmas[0] ** 2 + 1) ** 0.5)
        again = align_your_steps(pipe.schedule, job.sampler, 20)
        assert torch.equal(old.grid.sigmas, again.sigmas)


# --- a VAE with a shift -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shifted") / "model"
    return make_family("shifted", folder), load(folder)


@torch.no_grad()
def folded(vae):
    """The same VAE with its shift in the convolutions beside the latents, which diffusers' pipelines heed."""
    vae, shift = copy.deepcopy(vae), vae.config.shift_factor
    vae.quant_conv.bias[: vae.config.latent_channels] -= shift
    vae.post_quant_conv.bias += shift * vae.post_quant_conv.weight.sum((1, 2, 3))
    vae.register_to_config(shift_factor=None)
    return vae


def test_a_shift_when_decoded(shifted):
    peer, pipe = shifted
    call = COMMON | {"num_inference_steps": 3, "output_type": "np"}
    # The picture beside the latents is not scaled and not shifted: of that VAE as it is.
    twin = with_parts(peer, "StableDiffusionInstructPix2PixPipeline", vae=folded(peer.vae))
    twin.vae.encode = peer.vae.encode
    assert error(pipe(**call, seed=5).images, twin(**call, generator=generator()).images) < 1e-4


def test_a_shift_when_encoded_and_decoded(shifted, kl):
    peer, pipe = kl
    img2img = with_parts(peer, "StableDiffusionImg2ImgPipeline", vae=folded(shifted[0].vae))
    own = ldm.Pipeline.from_parts(replace(pipe.parts, vae=shifted[1].vae))
    call = COMMON | {"num_inference_steps": 4, "strength": 0.5}
    for output_type in ("latent", "np"):
        call["output_type"] = output_type
        assert error(own(**call, seed=5).images, img2img(**call, generator=generator()).images) < 1e-4
