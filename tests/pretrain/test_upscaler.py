"""The upscaler's trainer: pairs that lie on each other, diffusers' loss, a figure that the pipeline draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from tiny_tasks import learn
from tiny_upscaler import KL, LOW_RES, SCHEDULER, SIDE, UNET, upscaler_parts

import ldm
from ldm.errors import UserError
from ldm.evaluate.distances import psnr
from ldm.models import build
from ldm.postcards.comparisons.upscaling import bicubic
from ldm.pretrain.data import Pictures
from ldm.pretrain.upscaler import Pairs, UpscalerTask, make_pairs
from ldm.pretrain.vae import VAETask, build_vae


@pytest.fixture
def parts(tmp_path):
    return upscaler_parts(tmp_path / "tokenizer")


def scenes(side: int) -> Pictures:
    """The same six smooth scenes at any size: each pixel is the mean over its square."""
    fine = np.kron(np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)), np.ones((1, 8, 8, 1)))
    means = fine.reshape(6, side, 32 // side, side, 32 // side, 3).mean((2, 4))
    return Pictures(means.round().astype(np.uint8), [[f"scene {i}"] for i in range(6)])


@pytest.fixture
def pairs(parts, tmp_path):
    return make_pairs(scenes(2 * SIDE), scenes(SIDE), parts.vae, tmp_path, latent_noise=0.2)


def test_crops_of_both_sizes_show_the_same_place(parts, pairs):
    task = UpscalerTask(parts, pairs, pairs, {"crop": 6, "degraded": 0, "noised": 0})
    batch = task.batch(torch.Generator().manual_seed(0), 40)
    assert batch["small"].shape == (40, 3, 6, 6)
    pooled = torch.nn.functional.avg_pool2d(batch["large"], 2)
    assert (pooled - batch["small"]).abs().max() < 0.015  # rounded, and level 0 has a thousandth of noise
    assert batch["small"].flatten(1).unique(dim=0).shape[0] > 20  # corners differ
    assert not batch["level"].any()


def test_small_pictures_are_degraded_and_noised_as_asked_for(parts, pairs):
    clean = UpscalerTask(parts, pairs, pairs, {"crop": 0, "degraded": 0, "noised": 0})
    degraded = UpscalerTask(parts, pairs, pairs, {"crop": 0, "degraded": 1, "noised": 0})
    noised = UpscalerTask(parts, pairs, pairs, {"crop": 0, "degraded": 0, "noised": 1})
    a, b, c = (task.batch(torch.Generator().manual_seed(1), 400) for task in (clean, degraded, noised))
    assert torch.equal(a["large"], b["large"])
    all_large = pairs.large.tensors(torch.arange(6))
    index = torch.tensor([int((all_large == each).flatten(1).all(1).nonzero()) for each in a["large"]])
    assert torch.allclose(b["small"], pairs.degraded.tensors(index), atol=0.006)
    assert not np.array_equal(pairs.degraded.images, pairs.clean.images)
    assert c["level"].unique().tolist() == list(range(32))
    scheduler = DDPMScheduler.from_config(LOW_RES)
    expected = torch.sqrt(1 - scheduler.alphas_cumprod[c["level"]])
    shown = torch.sqrt(scheduler.alphas_cumprod[c["level"]])[:, None, None, None] * pairs.clean.tensors(index)
    noise = c["small"] - shown
    assert (noise.flatten(1).std(1) / expected).mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_loss_and_gradients_equal_those_of_diffusers(parts, pairs, prediction):
    parts = replace(parts, scheduler=SCHEDULER | {"prediction_type": prediction})
    task = UpscalerTask(parts, pairs, pairs, {"crop": 8})
    batch = task.batch(torch.Generator().manual_seed(3), 6)
    batch["t"][0] = 999
    loss, _ = task(batch)
    loss.backward()

    unet = UNet2DConditionModel.from_config(parts.unet.to_config())
    unet.load_state_dict(parts.unet.state_dict())
    vae = AutoencoderKL.from_config(parts.vae.to_config())
    vae.load_state_dict(parts.vae.state_dict())
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    x0 = vae.encode(batch["large"]).latent_dist.mean * vae.config.scaling_factor
    noisy = scheduler.add_noise(x0, batch["noise"], batch["t"])
    velocity = DDPMScheduler.from_config(SCHEDULER).get_velocity(x0, batch["noise"], batch["t"])
    target = x0 if prediction == "sample" else velocity
    text = torch.zeros(6, 1, 4)
    answer = unet(torch.cat([noisy, batch["small"]], 1), batch["t"], text, class_labels=batch["level"]).sample
    reference = torch.nn.functional.mse_loss(answer, target.detach())
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    ours, theirs = parts.unet.conv_in.weight.grad, unet.conv_in.weight.grad
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4
    assert all(weight.grad is None for weight in parts.vae.parameters())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_pixels_add_the_error_of_the_picture_that_diffusers_guesses(parts, pairs, prediction):
    config = SCHEDULER | {"prediction_type": prediction}
    parts = replace(parts, scheduler=config)
    plain = UpscalerTask(parts, pairs, pairs, {"crop": 8})
    task = UpscalerTask(parts, pairs, pairs, {"crop": 8, "pixels": 0.5})
    batch = task.batch(torch.Generator().manual_seed(3), 3) | {"t": torch.tensor([999, 500, 20])}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(1000)
    x0 = parts.vae.encode_latents(batch["large"]).detach()
    noisy = scheduler.add_noise(x0, batch["noise"], batch["t"])
    answers = task._answer(noisy, batch)
    rows = zip(answers[:, None], batch["t"].tolist(), noisy[:, None], strict=True)
    guess = torch.cat([scheduler.step(*row).pred_original_sample for row in rows])
    pixels = torch.nn.functional.mse_loss(parts.vae.decode_latents(guess), batch["large"])
    reference = plain(batch)[0] + 0.5 * pixels
    reference.backward()
    expected = parts.unet.conv_in.weight.grad.clone()
    parts.unet.zero_grad()
    loss, said = task(batch)
    loss.backward()
    assert said["pixels"].item() == pytest.approx(pixels.item(), rel=1e-5)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert ((parts.unet.conv_in.weight.grad - expected).abs().max() / expected.abs().max()).item() < 1e-4
    assert all(weight.grad is None for weight in parts.vae.parameters())


def test_the_guess_is_made_in_fp32_under_autocast(parts, pairs):
    """At little noise the guess is the latents: in bf16 the schedule's small numbers would be lost."""
    task = UpscalerTask(replace(parts, scheduler=SCHEDULER), pairs, pairs, {"crop": 8})
    batch = task.batch(torch.Generator().manual_seed(3), 3) | {"t": torch.tensor([0, 2, 5])}
    alphas = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod[batch["t"]][:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        x0 = parts.vae.encode_latents(batch["large"]).detach().float()
    velocity = alphas.sqrt() * batch["noise"] - (1 - alphas).sqrt() * x0
    task._answer = lambda noisy, batch: velocity.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        predicted = task._losses_and_x0(batch)[1]
    assert ((predicted - x0).abs().max() / batch["noise"].abs().max()).item() < 1e-3


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_picture_in_one_step_is_that_of_the_pipeline(parts, pairs, tmp_path, prediction):
    parts = replace(parts, scheduler=SCHEDULER | {"prediction_type": prediction})
    with torch.no_grad():
        for network in (parts.unet, parts.vae.decoder):  # else it draws grey, whatever it sees
            network.conv_out.weight *= 20
    task = UpscalerTask(parts, pairs, pairs, {"crop": 0, "degraded": 0, "noised": 1})
    batch = task.batch(torch.Generator().manual_seed(0), 4)
    batch |= {"level": torch.zeros(4).long(), "t": torch.full((4,), 999)}
    small = batch["small"] = pairs.clean.tensors(torch.arange(4))
    with torch.no_grad():
        ours = task.in_one_step(batch).clamp(-1, 1)
    task.export(tmp_path / "model")
    pipe = ldm.load(tmp_path / "model", dtype="fp32")
    for image, noise, drawn in zip(small, batch["noise"], ours, strict=True):
        asked = {"latents": noise[None], "num_inference_steps": 1, "output_type": "pt"}
        (theirs,) = pipe("", image=(image + 1) / 2, **asked).images
        assert drawn.std() > 0.3
        # The weights went through bf16; level 0 has a thousandth of noise.
        assert ((drawn + 1) / 2 - theirs).abs().mean() < 0.01


def test_gain_is_what_the_pictures_have_over_bicubic(parts, pairs, monkeypatch):
    task, large = UpscalerTask(parts, pairs, pairs, {}), pairs.large.tensors(torch.arange(6))
    off = torch.randn(large.shape, generator=torch.Generator().manual_seed(0)) / 20
    monkeypatch.setattr(task, "in_one_step", lambda batch: batch["large"] + off)
    with torch.no_grad():
        gain = task.evaluate()["gain_db"]
    drawn = ((large + off).clamp(-1, 1) + 1) * 127.5
    drawn = drawn.round().byte().permute(0, 2, 3, 1).numpy()
    plain = bicubic(pairs.clean.images, 2 * SIDE)
    expected = psnr(drawn, pairs.large.images) - psnr(plain, pairs.large.images)
    assert gain == pytest.approx(expected.mean(), abs=1e-3)


def test_it_learns(parts, pairs):
    torch.manual_seed(0)
    task = UpscalerTask(parts, pairs, pairs, {"crop": 0, "degraded": 0, "noised": 0})
    before, after = learn(task, steps=60, size=6, lr=3e-3)
    assert after < 0.7 * before


def test_export_is_an_upscaler_that_draws_twice_the_size(parts, pairs, tmp_path):
    task = UpscalerTask(parts, pairs, pairs, {})
    task.export(tmp_path / "model")
    assert task.picture(tmp_path / "model").width > 3 * 2 * SIDE
    pipe = ldm.load(tmp_path / "model")
    request = pipe.resolve(ldm.Request(image=str(_saved(tmp_path))))
    assert (request.noise_level, request.num_inference_steps, request.guidance_scale) == (0, 2, 1.0)
    assert (request.height, request.width) == (2 * SIDE, 2 * SIDE)


def _saved(tmp_path):
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def test_a_new_kl_autoencoder_has_latents_of_one_size_whatever_its_scaling_factor():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    made = []
    for factor in (0.08333, 1.0):
        torch.manual_seed(0)
        vae = build_vae(KL | {"scaling_factor": factor})
        with torch.no_grad():
            latents = vae.encode_latents(images)
            made.append((latents, vae.decode_latents(latents)))
            assert (vae.encode(images).std < 1e-4).all()
    for ours, theirs in zip(*made, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def test_a_frozen_kl_encoder_keeps_its_latents(parts):
    task = VAETask(parts.vae, scenes(32), scenes(32), {}, decoder_only=True)
    task(task.batch(torch.Generator().manual_seed(0), 2))[0].backward()
    for name, weight in parts.vae.named_parameters():
        assert (weight.grad is None) == name.startswith(("encoder.", "quant_conv."))


@pytest.mark.parametrize(
    ("unet", "scheduler", "said"),
    [
        ({}, {"prediction_type": "epsilon"}, "v_prediction or sample, and rescale_betas_zero_snr"),
        ({}, {"rescale_betas_zero_snr": False}, "v_prediction or sample, and rescale_betas_zero_snr"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, {}, "without cross-attention"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, {}, "without cross-attention"),
        ({"num_class_embeds": 31}, {}, "num_class_embeds must be above max_noise_level .got 31 and 31"),
    ],
)
def test_what_it_cannot_train_is_said(parts, pairs, unet, scheduler, said):
    other = replace(parts, unet=build(UNET | unet), scheduler=SCHEDULER | scheduler)
    with pytest.raises(UserError, match=said):
        UpscalerTask(other, pairs, pairs, {})


def test_pictures_of_other_scenes_are_not_paired(parts, tmp_path):
    small = scenes(SIDE)
    other = Pictures(small.images, small.captions[::-1])
    with pytest.raises(UserError, match="not of the same scenes"):
        make_pairs(scenes(2 * SIDE), other, parts.vae, tmp_path, latent_noise=0.2)


def test_degraded_pictures_are_kept_by_weights_and_noise(parts, tmp_path):
    small, large = scenes(SIDE), scenes(2 * SIDE)
    first = make_pairs(large, small, parts.vae, tmp_path, latent_noise=0.2)
    assert isinstance(first, Pairs)
    again = make_pairs(large, small, parts.vae, tmp_path, latent_noise=0.2)
    assert np.array_equal(first.degraded.images, again.degraded.images)
    assert len(list(tmp_path.glob("degraded-*.npy"))) == 1
    make_pairs(large, small, parts.vae, tmp_path, latent_noise=0.4)
    assert len(list(tmp_path.glob("degraded-*.npy"))) == 2
