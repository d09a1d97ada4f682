"""Whole pictures against diffusers' StableDiffusionPipeline with the same tiny random weights, in fp32."""

import itertools
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_dpmsolver_sde
from safetensors.torch import load_file, save_file
from tiny_pipeline import PEERS, SCHEDULER, make_folder, randomise

import ldm
from ldm.diffusion.samplers import SAMPLERS

PROMPT, NEGATIVE = "the red boat", "sea"
BETAS = {name: SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Per kind of VAE: diffusers' pipeline and ours, of one folder."""
    made = {}
    for kind in ("kl", "tiny"):
        folder = tmp_path_factory.mktemp(kind) / "model"
        made[kind] = make_folder(folder, kind), ldm.load(folder, dtype="fp32", device="cpu")
    return made


@pytest.fixture
def peer(models):
    """diffusers' pipeline, its scheduler put back afterwards."""
    pipe, _ = models["kl"]
    before = pipe.scheduler
    yield pipe
    pipe.scheduler = before


@pytest.fixture
def pipe(models):
    return models["kl"][1]


def noise(count=1, seed=3):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def generator(seed=11):
    return torch.Generator().manual_seed(seed)


def error(ours, theirs):
    ours, theirs = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(theirs))
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def both(pipe, peer, **arguments):
    """The relative error between the two pipelines' latents."""
    common = {"negative_prompt": NEGATIVE, "num_inference_steps": 5, "output_type": "latent", **arguments}
    common.setdefault("prompt", PROMPT)
    common.setdefault("latents", noise())
    return error(pipe(**common).images, peer(**common).images)


def with_scheduler(pipe, scheduler):
    """Our pipeline with another scheduler's config, whose class is its default sampler."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    return ldm.Pipeline.from_parts(replace(pipe.parts, scheduler=config))


def share_brownian_noise(monkeypatch, pipe, sampler, steps):
    """Give diffusers' SDE schedulers the noise that ours draws from the same generator."""
    path = SAMPLERS[sampler].noise([generator()])
    like = noise()
    if sampler == "dpmpp_sde":
        monkeypatch.setattr(
            scheduling_dpmsolver_sde,
            "BrownianTreeNoiseSampler",
            lambda *_, **__: lambda high, low: path(like, float(high), float(low)),
        )
    elif sampler == "dpmpp_2m_sde":
        job = pipe.prepare(ldm.Request(sampler=sampler, num_inference_steps=steps))
        levels = job.grid.sigmas.tolist()
        drawn = iter([path(like, a, b) if b else like for a, b in itertools.pairwise(levels)])
        monkeypatch.setattr(scheduling_dpmsolver_multistep, "randn_tensor", lambda *_, **__: next(drawn))


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("sampler", PEERS)
def test_every_sampler_draws_diffusers_picture(models, tmp_path, monkeypatch, sampler, steps):
    peer, ours = models["kl"]
    name, options = PEERS[sampler]
    scheduler = getattr(diffusers, name)(**BETAS, **options)
    own = with_scheduler(ours, scheduler)
    share_brownian_noise(monkeypatch, own, sampler, steps)
    common = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": steps,
        "guidance_scale": 7.5,
        "latents": noise(),
    }
    with monkeypatch.context() as patch:
        patch.setattr(peer, "scheduler", scheduler)
        theirs = peer(**common, generator=generator(), output_type="latent").images
    mine = own(**common, generator=generator(), output_type="latent").images
    assert own.resolve(ldm.Request()).sampler == sampler
    assert error(mine, theirs) < 1e-4


def test_scheduler_of_the_folder_is_the_default_sampler(tmp_path):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    peer = make_folder(tmp_path / "euler", scheduler=scheduler)
    pipe = ldm.load(tmp_path / "euler", dtype="fp32", device="cpu")
    assert both(pipe, peer) < 1e-4
    assert pipe.resolve(ldm.Request()).sampler == "euler"


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_images_in_each_output_type(models, kind, output_type):
    peer, pipe = models[kind]
    common = {"prompt": PROMPT, "latents": noise(2), "num_images_per_prompt": 2, "num_inference_steps": 3}
    theirs = peer(**common, output_type=output_type).images
    ours = pipe(**common, output_type=output_type).images
    if output_type == "pil":
        assert [image.size for image in ours] == [image.size for image in theirs]
        levels = [np.asarray(a, int) - np.asarray(b, int) for a, b in zip(ours, theirs, strict=True)]
        assert np.abs(levels).max() <= 1
        assert np.mean(np.abs(levels) > 0) < 0.01
    else:
        assert type(ours) is type(theirs)
        assert np.asarray(theirs).std() > 0.05
        assert error(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"negative_prompt": None},
        {"prompt": ""},
        {"prompt": "3 RED  cats's, ü", "negative_prompt": "a boat."},
        {"num_images_per_prompt": 3, "latents": noise(3)},
        {"prompt": ["the red boat", "sea"], "negative_prompt": ["sea", "red"], "latents": noise(2)},
        {
            "prompt": ["the red", "a"],
            "num_images_per_prompt": 2,
            "negative_prompt": None,
            "latents": noise(4),
        },
        {"eta": 0.6, "generator": "fresh"},
        {"height": 24, "width": 8, "latents": noise()[..., :4].repeat(1, 1, 2, 1)[:, :, :12]},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_arguments_mean_what_they_mean_in_diffusers(pipe, peer, arguments):
    fresh = arguments.get("generator") == "fresh"
    drawn = []
    for each in (pipe, peer):
        common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 5, "latents": noise()}
        arguments = {**arguments, "generator": generator() if fresh else None}
        drawn.append(each(**{**common, **arguments}, output_type="latent").images)
    assert error(*drawn) < 1e-4


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(pipe, peer, clip_skip):
    # diffusers' own is broken with transformers 5.6 and later: its formula, by hand.
    texts = peer.tokenizer([PROMPT, NEGATIVE], padding="max_length", max_length=16, return_tensors="pt")
    encoder = peer.text_encoder
    hidden = encoder(texts.input_ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    cond, uncond = encoder.final_layer_norm(hidden).detach().split(1)
    assert error(pipe.text.encode([PROMPT], clip_skip).tokens, cond) < 1e-5
    assert error(pipe.text.encode([PROMPT]).tokens, cond) > 1e-2
    common = {"latents": noise(), "num_inference_steps": 5, "output_type": "latent"}
    theirs = peer(prompt_embeds=cond, negative_prompt_embeds=uncond, **common).images
    ours = pipe(PROMPT, negative_prompt=NEGATIVE, clip_skip=clip_skip, **common).images
    assert error(ours, theirs) < 1e-4


def test_custom_timesteps(pipe, peer):
    peer.scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False)
    common = {"prompt": PROMPT, "latents": noise(), "timesteps": [901, 600, 333, 20], "output_type": "latent"}
    theirs = peer(**common, generator=generator()).images
    ours = pipe(**common, generator=generator(), sampler="ddpm").images
    assert error(ours, theirs) < 1e-4


def test_custom_sigmas(pipe, peer):
    peer.scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    common = {
        "prompt": PROMPT,
        "latents": noise(),
        "sigmas": [12.0, 5.0, 1.5, 0.3, 0.0],
        "output_type": "latent",
    }
    assert error(pipe(**common, sampler="euler").images, peer(**common).images) < 1e-4


def test_embeddings_instead_of_prompts(pipe, peer):
    cond, uncond = peer.encode_prompt([PROMPT, "sea"], "cpu", 1, True, ["red", "boat"])
    both_given = {"prompt": None, "negative_prompt": None, "prompt_embeds": cond, "latents": noise(2)}
    assert both(pipe, peer, **both_given, negative_prompt_embeds=uncond) < 1e-4
    one = {"prompt": None, "negative_prompt": "red", "prompt_embeds": cond[:1]}
    assert both(pipe, peer, **one) < 1e-4


def test_text_encoder(pipe, peer):
    prompts = [PROMPT, "", "a b c d e f g", "boat's 42!"]
    theirs, _ = peer.encode_prompt(prompts, "cpu", 1, False)
    assert error(pipe.text.encode(prompts).tokens, theirs.detach()) < 1e-5


def test_seed_is_diffusers_generator(pipe, peer):
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, "eta": 0.5, "output_type": "latent"}
    generators = [generator(5), generator(6)]
    theirs = peer(**arguments, num_images_per_prompt=2, generator=generators).images
    assert error(pipe(**arguments, num_images_per_prompt=2, seed=5).images, theirs) < 1e-4
    # One generator is drawn from by all pictures of the batch, one after the other.
    theirs = peer(**arguments, num_images_per_prompt=2, generator=generator(5)).images
    ours = pipe(**arguments, num_images_per_prompt=2, generator=generator(5)).images
    assert error(ours, theirs) < 1e-4


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_what_is_saved_opens_in_diffusers(models, tmp_path, kind):
    peer, pipe = models[kind]
    pipe.save(tmp_path / "saved")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "latents": noise(), "num_inference_steps": 3}
    theirs = again(**common, output_type="np").images
    assert np.array_equal(theirs, peer(**common, output_type="np").images)
    assert error(pipe(**common, output_type="np").images, theirs) < 1e-4
    reloaded = ldm.load(tmp_path / "saved", dtype="fp32", device="cpu")
    assert np.array_equal(
        reloaded(**common, output_type="np").images, pipe(**common, output_type="np").images
    )


def test_asymmetric_vae_of_a_folder(tmp_path):
    """Its weights, config and picture; and what is saved again, its condition encoder too."""
    vae = diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 24),
        layers_per_up_block=2,
        norm_num_groups=4,
    )
    peer = make_folder(tmp_path / "kl")
    peer.register_modules(vae=randomise(vae))
    peer.save_pretrained(tmp_path / "model")
    pipe = ldm.load(tmp_path / "model", dtype="fp32", device="cpu")
    common = {"prompt": PROMPT, "latents": noise(), "num_inference_steps": 3, "output_type": "np"}
    want = peer(**common).images
    assert error(pipe(**common).images, want) < 1e-4
    pipe.save(tmp_path / "saved")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**common).images, want)
    with pytest.raises(ldm.UserError, match="the single-file layout has no AsymmetricAutoencoderKL"):
        pipe.save(tmp_path / "one.safetensors")


@pytest.mark.parametrize("alone", [False, True], ids=["beside their parts", "alone"])
def test_fused_projections_are_read(tmp_path, alone):
    """As `fuse_qkv_projections` saves them, with or without what they were fused of."""
    peer = make_folder(tmp_path / "model")
    common = {"prompt": PROMPT, "latents": noise(), "num_inference_steps": 3, "output_type": "np"}
    want = peer(**common).images
    peer.fuse_qkv_projections()
    peer.save_pretrained(tmp_path / "fused")
    fused = 0
    for part in ("unet", "vae"):
        path = tmp_path / "fused" / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        for name in [name for name in tensors if ".to_qkv." in name or ".to_kv." in name]:
            fused += 1
            parts = ("to_k", "to_v", "to_q")[: 3 if ".to_qkv." in name else 2]
            for each in parts if alone else ():
                del tensors[name.replace("to_qkv", each).replace("to_kv", each)]
        save_file(tensors, path)
    assert fused > 5
    pipe = ldm.load(tmp_path / "fused", dtype="fp32", device="cpu")
    assert error(pipe(**common).images, want) < 1e-4
    unet = path.parents[1] / "unet" / path.name
    from_file = ldm.load(tmp_path / "model", dtype="fp32", device="cpu", unet=unet)
    assert error(from_file(**common).images, want) < 1e-4
