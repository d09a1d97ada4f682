"""The pipeline as an object: batches, seeds, threads, steps, callbacks, output types, NaN."""

import copy
import hashlib
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_folder

import ldm
from ldm.checkpoint import Defaults
from ldm.diffusion.guidance import CFG
from ldm.diffusion.samplers import SAMPLERS
from ldm.runtime import Runtime

LONG = "the red boat at sea " * 5  # two windows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    make_folder(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return ldm.load(folder, device="cpu", dtype="fp32")


def latents(pipe, prompt="the red boat", **arguments):
    return pipe(prompt, **{"num_inference_steps": 3, "output_type": "latent", **arguments}).images


def error(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


# --- seeds and batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_equals_its_pictures_drawn_alone(pipe, sampler):
    asked = {"sampler": sampler}
    if sampler == "dpm_adaptive":  # whose steps are many where the network is random
        asked["sampler_options"] = {"rtol": 0.5, "atol": 0.5}
    batch = latents(pipe, num_images_per_prompt=3, seed=1, **asked)
    alone = torch.cat([latents(pipe, seed=seed, **asked) for seed in (1, 3)])  # the ends
    assert error(batch[::2], alone) < 1e-5
    assert error(batch[:1], batch[1:2]) > 1e-2


def test_prompts_of_different_lengths_do_not_change_each_other(pipe):
    prompts, negatives = ["the red boat", LONG, "sea"], ["", "sea", LONG]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = latents(pipe, prompts, negative_prompt=negatives, seed=[4, 2, 9])
        alone = [
            latents(pipe, prompt, negative_prompt=negative, seed=seed)
            for prompt, negative, seed in zip(prompts, negatives, [4, 2, 9], strict=True)
        ]
    assert error(batch, torch.cat(alone)) < 1e-5


def test_splitting_a_batch_changes_nothing(pipe, monkeypatch):
    whole = latents(pipe, num_images_per_prompt=5, seed=1)
    monkeypatch.setattr("ldm.runtime.CPU_PIXELS", 2 * 16 * 16)
    assert pipe.runtime.images_at_once(16, 16) == 2
    assert error(latents(pipe, num_images_per_prompt=5, seed=1), whole) < 1e-5


def test_same_call_same_bytes(folder, pipe):
    first = latents(pipe, seed=3, sampler="euler_a")
    assert torch.equal(latents(pipe, seed=3, sampler="euler_a"), first)
    assert torch.equal(
        latents(ldm.load(folder, device="cpu", dtype="fp32"), seed=3, sampler="euler_a"), first
    )


def test_two_threads_share_a_pipeline(pipe):
    seeds, samplers = range(6), ["dpmpp_2m", "pndm", "unipc", "lms", "dpmpp_sde", "euler_a"]

    def draw(seed):
        return latents(pipe, seed=seed, sampler=samplers[seed], num_inference_steps=6)

    one_by_one = [draw(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, seeds))
    assert all(error(a, b) < 1e-6 for a, b in zip(together, one_by_one, strict=True))


def test_result_tells_its_seeds_and_requests(pipe):
    result = pipe(["sea", "boat"], num_images_per_prompt=2, seed=7, num_inference_steps=2)
    assert result.seeds == (7, 8, 9, 10)
    assert [request.prompt for request in result.requests] == ["sea", "boat"]
    again = [image for request in result.requests for image in pipe.generate(request).images]
    assert all(np.array_equal(a, b) for a, b in zip(result.images, again, strict=True))


def test_without_a_seed_pictures_differ_and_can_be_drawn_again(pipe):
    first, second = (pipe("sea", num_inference_steps=2, output_type="latent") for _ in range(2))
    assert error(first.images, second.images) > 1e-2
    assert torch.equal(latents(pipe, "sea", num_inference_steps=2, seed=first.seeds[0]), first.images)


# --- steps -----------------------------------------------------------------------------------------------


def test_denoise_gives_every_step(pipe):
    request = ldm.Request(prompt="the red boat", seeds=(1, 2), num_inference_steps=4, sampler="euler")
    steps = list(pipe.denoise(request))
    assert [step.i for step in steps] == [0, 1, 2, 3]
    levels = pipe.prepare(request).grid.sigmas[1:].tolist()
    assert [step.sigma for step in steps] == pytest.approx(levels)
    drawn = pipe.generate(request, output_type="latent").images
    assert torch.equal(steps[-1].x, drawn)
    images = pipe.decode(drawn)
    assert torch.equal(images, pipe.generate(request, output_type="pt").images)
    assert images.min() >= 0
    assert images.max() <= 1


def test_callback_sees_each_step_and_may_replace_latents(pipe):
    seen = []

    def watch(pipeline, step, timestep, given):
        assert pipeline is pipe
        seen.append((step, timestep, given["latents"].clone()))

    plain = latents(pipe, seed=1, sampler="ddim", callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == [667, 334, 1]
    assert torch.allclose(seen[-1][2], plain, rtol=1e-5)
    assert 0.3 < float(seen[0][2].std() / seen[-1][2].std()) < 3  # not in sigma space

    def restart(pipeline, step, timestep, given):
        return {"latents": seen[step][2] if step == 1 else given["latents"]}

    other = latents(pipe, seed=2, sampler="ddim", callback_on_step_end=restart)
    assert error(other, plain) < 1e-4


def test_own_sampler_and_guidance(pipe):
    def straight(denoise, x, sigmas, noise):
        for i in range(len(sigmas) - 1):
            d = denoise(x, sigmas[i])
            x = d.x0 + float(sigmas[i + 1] / sigmas[i]) * (x - d.x0)
            yield ldm.diffusion.solvers.Step(i, float(sigmas[i + 1]), x, d.x0)

    euler = latents(pipe, seed=1, sampler="euler")
    assert error(latents(pipe, seed=1, sampler=straight), euler) < 1e-5
    assert torch.equal(latents(pipe, seed=1, sampler="euler", guidance=CFG(7.5)), euler)
    assert error(latents(pipe, seed=1, sampler="euler", guidance=CFG(2.0)), euler) > 1e-2


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [("pil", list, None), ("np", np.ndarray, (2, 16, 16, 3)), ("pt", torch.Tensor, (2, 3, 16, 16))],
)
def test_output_types(pipe, output_type, kind, shape):
    images = pipe(
        "sea", num_images_per_prompt=2, num_inference_steps=2, seed=1, output_type=output_type
    ).images
    assert isinstance(images, kind)
    if shape is None:
        assert [(image.mode, image.size) for image in images] == [("RGB", (16, 16))] * 2
        assert isinstance(images[0], Image.Image)
    else:
        assert images.shape == shape
        assert images.dtype in (np.float32, torch.float32)


# --- defaults and words ----------------------------------------------------------------------------------


def test_defaults_of_the_folder(folder, pipe, tmp_path):
    full = pipe.resolve(ldm.Request())
    assert (full.num_inference_steps, full.guidance_scale, full.height, full.width) == (50, 7.5, 16, 16)
    assert (full.sampler, full.eta, full.model) == ("ddim", 0.0, "model")
    assert full.spacing == pipe.schedule.timestep_spacing
    digest = hashlib.sha256((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert full.model_hash == digest.hexdigest()[:10]
    assert pipe.resolve(ldm.Request(sigmas=(2.0, 1.0, 0.0))).spacing is None
    own = Defaults(12, 3.0, "DPM++ 2M Karras", None, 24, 32)
    pipe_with = ldm.Pipeline.from_parts(replace(pipe.parts, defaults=own, words=frozenset({"red", "sea"})))
    pipe_with.save(tmp_path / "saved")
    full = ldm.load(tmp_path / "saved", device="cpu", dtype="fp32").resolve(ldm.Request(width=40))
    assert (full.num_inference_steps, full.guidance_scale, full.height, full.width) == (12, 3.0, 24, 40)
    assert (full.sampler, full.spacing) == ("dpmpp_2m", "karras")
    full = pipe_with.resolve(ldm.Request(sampler="euler", spacing="trailing", guidance_scale=0))
    assert (full.sampler, full.spacing, full.guidance_scale) == ("euler", "trailing", 0)


def test_unknown_words(pipe):
    assert pipe.unknown_words("anything at all") == []
    known = ldm.Pipeline.from_parts(replace(pipe.parts, words=frozenset({"red", "sea", "boat's"})))
    assert known.unknown_words("A RED, dragon; dragon on the boat's Sea 42!") == ["a", "dragon", "on", "the"]


# --- what goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "jpeg"}, "output_type 'jpeg' .* pil, np, pt, latent"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt has 1 texts for 2 prompts"),
        ({"prompt": []}, "prompt has 0 texts"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 9, 8)}, r"latents \[1, 4, 9, 8\] .* \[1, 4, 8, 8\]"),
        ({"prompt_embeds": torch.zeros(1, 16, 7)}, "differ in shape"),
        ({"prompt_embeds": torch.zeros(1, 16, 7), "negative_prompt_embeds": torch.zeros(1, 16, 7)}, "24"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"sampler": "eulr"}, "euler"),
        ({"height": 12}, "height 12"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_one_clear_line(pipe, arguments, message):
    with pytest.raises(ldm.UserError, match=message) as caught:
        pipe(**{"prompt": "sea", "num_inference_steps": 2, **arguments})
    assert len(str(caught.value).splitlines()) <= 2


def test_nan_in_half_precision_is_redone_in_fp32(folder):
    half = ldm.load(folder, device="cpu", dtype="fp16")
    with torch.no_grad():  # 1e6 inside: too much for fp16
        half.unet.time_embedding.linear_1.weight.mul_(1e3)
        half.unet.time_embedding.linear_2.weight.mul_(1e3)
    with pytest.warns(UserWarning, match="the U-Net gave NaN or Inf in float16: done again in float32"):
        drawn = latents(half, seed=1)
    assert half.unet.conv_in.weight.dtype is torch.float16
    exact = ldm.Pipeline.from_parts(replace(half.parts, unet=copy.deepcopy(half.unet).float()))
    assert error(drawn, latents(exact, seed=1)) < 1e-6


def test_nan_never_becomes_a_picture(folder):
    broken = ldm.load(folder, device="cpu", dtype="fp32")
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the U-Net gives NaN"):
        latents(broken)
    with pytest.raises(FloatingPointError, match="the VAE's decoder gives NaN"):
        broken.decode(torch.full((1, 4, 8, 8), float("nan")))


# --- start-up --------------------------------------------------------------------------------------------


def test_import_ldm_is_light():
    code = "import sys, ldm; ldm.UserError; print(*{'torch', 'transformers', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_names():
    assert {"load", "Pipeline", "Request", "UserError"} <= set(dir(ldm))
    with pytest.raises(AttributeError, match="nothing"):
        _ = ldm.nothing
    assert Runtime(torch.device("cpu"), torch.float16).vae_dtype(force_upcast=True) is torch.float32
    assert Runtime(torch.device("cpu"), torch.float16).vae_dtype(force_upcast=False) is torch.float16


# --- the VAE over bands ----------------------------------------------------------------------------------


def test_tiling_is_of_a_new_pipeline_and_changes_no_picture(pipe, monkeypatch):
    from ldm.models import vae_bands

    ways, bands = [], vae_bands.decode_bands
    monkeypatch.setattr(vae_bands, "decode_bands", lambda *x, keep: ways.append("bands") or bands(*x, keep))
    tiled = pipe.with_vae_tiling()
    whole, by_bands = (
        each("sea", num_inference_steps=2, seed=3, output_type="pt").images for each in (pipe, tiled)
    )
    assert error(by_bands, whole) < 1e-5
    assert ways == ["bands"]
    assert next(tiled.vae.parameters()) is next(pipe.vae.parameters())
    assert [each.vae.over_bands for each in (pipe, tiled, tiled.to("cpu"), tiled.base)] == [
        None,
        True,
        True,
        True,
    ]
    assert tiled.with_vae_tiling(False).vae.over_bands is False
    monkeypatch.setattr(Runtime, "free_memory", 0)
    pipe("sea", num_inference_steps=2, seed=3)
    assert ways == ["bands"] * 2
