"""Whole pictures of every family against diffusers' own pipeline, same tiny random weights, in fp32.

Both draw from generators of the same seed, image inputs and all: only Brownian noise is shared by hand.
"""

import copy
import itertools
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_sde
from PIL import Image
from tiny_families import BETAS, FAMILIES, make_family
from tiny_pipeline import PEERS

import ldm
from ldm.diffusion.noise import BrownianNoise

PROMPT, NEGATIVE = "the red boat", "sea"
SAMPLERS = [
    *("ddim", "ddpm", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m karras"),
    *("dpmpp_sde", "lms", "unipc", "lcm"),
]


def picture(height=16, width=16, seed=1):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def half_mask(height=16, width=16):
    """White below a slanting edge, with a soft border."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.clip(40 * (y - 0.4 * x - 3.2) + 128, 0, 255).astype(np.uint8))


# What a family is drawn with beside prompts, steps and scale.
INPUTS = {
    "refiner": {"image": picture(), "strength": 0.75},
    "inpaint": {"image": picture(), "mask_image": half_mask(), "strength": 1.0},
    "pix2pix": {"image": picture()},
    "shifted": {"image": picture()},
    "upscaler": {"image": picture(8, 8), "noise_level": 20},
}
INPUTS |= {"inpaint_sd2": INPUTS["inpaint"], "inpaint_xl": INPUTS["inpaint"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family: diffusers' pipeline and ours, of one folder, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            made[name] = make_family(name, folder), ldm.load(folder, dtype="fp32", device="cpu")
        return made[name]

    return get


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def error(ours, theirs):
    ours, theirs = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(theirs))
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def arguments(name, **changes):
    common = {"prompt": PROMPT, "num_inference_steps": 7, "guidance_scale": 7.5, "output_type": "latent"}
    if name != "lcm":
        common["negative_prompt"] = NEGATIVE
    return {**common, **INPUTS.get(name, {}), **changes}


def both(models, name, ours=None, **changes):
    """The relative error between the two pipelines' pictures."""
    peer, pipe = models(name)
    call = arguments(name, **changes)
    theirs = peer(**{"generator": generator(), **call}).images
    return error((ours or pipe)(**{"seed": 5, **call}).images, theirs)


def to_float64(models, name, **changes):
    """As `both`, of the same noise, with diffusers in float64: from sigma 4096 its fp32 loses four digits."""
    peer, pipe = models(name)
    call = arguments(name, **changes)
    latents = torch.randn(1, *pipe.prepare(ldm.Request()).start.shape, generator=generator())
    theirs = copy.deepcopy(peer).to(torch.float64)(latents=latents.double(), **call).images
    return error(pipe(latents=latents, **call).images, theirs)


# --- samplers --------------------------------------------------------------------------------------------


def without_counterpart(family, sampler, steps):
    """Why diffusers draws no picture, or another one, with this sampler; "" if it draws the same."""
    if family == "zero_terminal" and 1000 % steps:
        return "on trailing, diffusers' DDIM steps to t - 1000 // n: docs/samplers.md"
    if sampler == "pndm" and FAMILIES[family].schedule.get("prediction_type") == "v_prediction":
        return "diffusers combines v of several timesteps as if it were noise: docs/samplers.md"
    return ""


def with_scheduler(pipe, scheduler):
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    return ldm.Pipeline.from_parts(replace(pipe.parts, scheduler=config))


def share_brownian_noise(monkeypatch, shape):
    """One path, whatever its seed, for ours and for diffusers' DPM++ SDE."""
    path = BrownianNoise([7])
    like = torch.zeros(1, *shape)
    path(like, 2.0, 1.0)
    monkeypatch.setattr("ldm.diffusion.noise.BrownianPaths", lambda *_: path._paths)
    monkeypatch.setattr(
        scheduling_dpmsolver_sde,
        "BrownianTreeNoiseSampler",
        lambda *_, **__: lambda high, low: path(like, float(high), float(low)),
    )


def peer_for(peer, family, sampler):
    """LatentConsistencyModelPipeline runs with LCMScheduler only; SD's takes such a U-Net with any."""
    if family != "lcm" or sampler == "lcm":
        return peer
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    parts = {name: getattr(peer, name) for name in names}
    pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


DRAWN = ("sd1", "sd2_v", "sdxl", "refiner", "inpaint", "inpaint_xl", "pix2pix", "upscaler", "lcm")


def every_sampler():
    """Each sampler with each family and number of steps, of which most are `slow`.

    A solver knows of no family, and a family of no solver: what they share is where a run begins. So every
    sampler draws from noise (sd1, where few steps are tried too) and from midway (the refiner); each other
    family is drawn by three, and each sampler draws a few of them. Samplers with grids, predictions and
    numbers of steps are compared in test_schedulers.py.
    """
    for (k, family), (j, sampler), steps in itertools.product(enumerate(DRAWN), enumerate(SAMPLERS), (2, 7)):
        quick = family == "sd1" or (steps == 7 and (family == "refiner" or (j + k) % 4 == 0))
        yield pytest.param(family, sampler, steps, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "sampler", "steps"), every_sampler())
def test_every_sampler_draws_diffusers_picture(models, monkeypatch, family, sampler, steps):
    if reason := without_counterpart(family, sampler, steps):
        pytest.skip(reason)
    peer, ours = models(family)
    name, _, karras = sampler.partition(" ")
    class_name, options = PEERS[name]
    options = {**options, "prediction_type": peer.scheduler.config.prediction_type}
    options |= {"use_karras_sigmas": True} if karras else {}
    scheduler = getattr(diffusers, class_name)(**BETAS, **options)
    own = with_scheduler(ours, scheduler)
    share_brownian_noise(monkeypatch, (4, 8, 8))
    their = peer_for(peer, family, sampler)
    monkeypatch.setattr(their, "scheduler", scheduler)
    call = arguments(family, num_inference_steps=steps)
    if family == "refiner" and sampler in ("pndm", "lms"):
        # Runs begun midway are wrong in diffusers: PNDM's list of timesteps, whose second is there twice, is
        # cut one too early, and LMS weighs its slopes as if it had those of the steps left out.
        call["strength"] = 1.0
    theirs = their(**call, generator=generator()).images
    drawn = own(**call, seed=5)
    assert drawn.request.sampler == name
    assert error(drawn.images, theirs) < 1e-4


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_scheduler_of_the_folder(models, family, steps):
    """Zero terminal SNR, trailing and leading steps, v-prediction: as the family's own scheduler has them."""
    if reason := without_counterpart(family, FAMILIES[family].scheduler[:4].lower(), steps):
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "xl_v":
            assert to_float64(models, family, num_inference_steps=steps) < 2e-5
        else:
            assert both(models, family, num_inference_steps=steps) < 1e-4


@pytest.mark.parametrize("family", ["sd_turbo", "sdxl_turbo", "lightning"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_distilled_models_draw_without_guidance(models, family, scale):
    assert both(models, family, num_inference_steps=4, guidance_scale=scale, negative_prompt=None) < 1e-4


@pytest.mark.parametrize("family", ["sdxl", "refiner", "pix2pix", "upscaler", "lcm"])
def test_pictures_decoded(models, family):
    assert both(models, family, output_type="np") < 1e-4


# --- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"negative_prompt": None},  # zeros
        {"negative_prompt": ""},  # the encoding of no words
        {"prompt_2": "a sea", "negative_prompt_2": "red"},
        {"prompt": [PROMPT, "sea"], "negative_prompt": ["sea", "red"], "seed": [5, 6]},
        {"original_size": (40, 24), "crops_coords_top_left": (3, 5), "target_size": (20, 22)},
        {
            "negative_original_size": (8, 12),
            "negative_crops_coords_top_left": (2, 1),
            "negative_target_size": (30, 31),
        },
        {"guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
        {"height": 24, "width": 8},
        {"clip_skip": 1, "negative_prompt": None},  # with one, diffusers leaves the negative prompt's alone
        {"eta": 0.4, "sampler": "ddim"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_arguments_of_sdxl(models, monkeypatch, changes):
    peer, pipe = models("sdxl")
    sampler = {"sampler": changes.pop("sampler")} if "sampler" in changes else {}
    if sampler:
        monkeypatch.setattr(peer, "scheduler", diffusers.DDIMScheduler(**BETAS, clip_sample=False))
        pipe = with_scheduler(pipe, peer.scheduler)
    seeds = changes.pop("seed", [5])
    call = arguments("sdxl", **changes)
    theirs = peer(**call, generator=[generator(seed) for seed in seeds]).images
    assert error(pipe(**call, **sampler, seed=seeds).images, theirs) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"aesthetic_score": 4.0, "negative_aesthetic_score": 7.0},
        {"strength": 1.0},
        {"strength": 0.3},
        {"image": picture(25, 17)},
        {"image": torch.rand(1, 3, 16, 16, generator=generator())},
        {"negative_prompt": None},
        {"original_size": (40, 24), "negative_original_size": (8, 12)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_arguments_of_the_refiner(models, changes):
    assert both(models, "refiner", **changes) < 1e-4


def test_img2img_of_sd1(models):
    peer, _ = models("sd1")
    names = ("unet", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    parts = {name: getattr(peer, name) for name in names} | {"scheduler": scheduler}
    img2img = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    own = with_scheduler(models("sd1")[1], scheduler)
    call = arguments("sd1", image=picture(24, 16))  # strength 0.8 is the default of both
    assert error(own(**call, seed=5).images, img2img(**call, generator=generator()).images) < 1e-4


@pytest.mark.parametrize("family", ["inpaint", "inpaint_xl"])
@pytest.mark.parametrize(
    "changes",
    [
        {"strength": 0.6},
        {"image": picture(40, 24), "mask_image": half_mask(30, 20), "height": 24, "width": 16},
        {
            "image": torch.rand(1, 3, 16, 16, generator=generator()),
            "mask_image": torch.rand(1, 1, 16, 16, generator=generator()),
        },
        {"guidance_scale": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_arguments_of_inpainting(models, family, changes):
    assert both(models, family, **changes) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"image_guidance_scale": 1.0},
        {"image_guidance_scale": 0.5},  # diffusers: no guidance at all
        {"guidance_scale": 1.0},
        {"image": picture(17, 25)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_arguments_of_pix2pix(models, changes):
    assert both(models, "pix2pix", **changes) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{"noise_level": 0}, {"noise_level": 300}, {"image": picture(8, 12)}, {"guidance_scale": 1.0}],
    ids=lambda changes: "-".join(changes),
)
def test_arguments_of_the_upscaler(models, changes):
    assert both(models, "upscaler", **changes) < 1e-4


def test_embeddings_instead_of_prompts(models):
    peer, pipe = models("sdxl")
    cond, uncond, pooled, negative_pooled = (
        each.detach() for each in peer.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    )
    given = {
        "prompt_embeds": cond,
        "negative_prompt_embeds": uncond,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    assert both(models, "sdxl", prompt=None, negative_prompt=None, **given) < 1e-4
    by_words = pipe(**arguments("sdxl"), seed=5).images
    assert (
        error(pipe(**arguments("sdxl", prompt=None, negative_prompt=None, **given), seed=5).images, by_words)
        < 1e-5
    )
