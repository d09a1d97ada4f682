"""`ldm finetune` of a learned variance: how it begins, its loss beside improved-diffusion's, exact resume."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from tiny_finetune import QUICK, interrupted, result, run, write_pictures
from torch.nn import functional as F

import ldm
from ldm.checkpoint import load_parts
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.evaluate.bound import picture_bounds
from ldm.evaluate.likelihood import denoising_bounds
from ldm.finetune import finetune as module
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.finetune.variance import widen_output
from ldm.pipeline import Pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 6)


@pytest.fixture
def task(families, data, tmp_path, monkeypatch):
    """A factory: the task of a fine-tuning that has not begun."""

    def make(model, **options):
        tasks = []
        monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.train()))
        monkeypatch.setattr(module, "_report", lambda *_: None)
        given = {"model": str(model), "train_data_dir": data, "output_dir": tmp_path / "run", "held_out": 0}
        settings = QUICK | given | {"train_batch_size": 3, "mode": "full", "variance": "hybrid"}
        finetune(FinetuneRecipe.model_validate(settings | options))
        return tasks[0]

    return make


def draw(parts, **arguments):
    pipe = Pipeline.from_parts(parts)
    common = {"num_inference_steps": 4, "seed": 3, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe("red boat", **(common | arguments)).images


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_widened_model_draws_as_before(families, family, variance):
    parts = load_parts(families(family)[0], None)
    parts = replace(parts, scheduler={**parts.scheduler, "variance_type": variance})
    wide = widen_output(parts)
    assert wide.unet.config.out_channels == 8
    assert parts.unet.config.out_channels == 4
    assert wide.scheduler["variance_type"] == "learned_range"
    assert widen_output(wide) is wide
    for sampler in ("ddpm", "dpmpp_2m"):
        before = draw(parts, sampler=sampler)
        assert torch.allclose(draw(wide, sampler=sampler), before, rtol=1e-4, atol=1e-4)
    assert set(SAMPLERS) > {"ddpm"}


@pytest.mark.parametrize("family", ["sd1", "sd2_v"])
def test_a_step_is_that_of_improved_diffusion(task, families, family):
    """Its hybrid loss on diffusers' U-Net and scheduler: mean square, and 0.001 T times the KL in bits."""
    folder, pipe = families(family)
    ours = task(folder)
    with torch.no_grad():
        for tensor in (ours.unet.conv_out.weight, ours.unet.conv_out.bias):
            tensor[4:] += 0.1 * torch.randn(tensor[4:].shape, generator=torch.Generator().manual_seed(1))
    batch = ours.batch(torch.Generator().manual_seed(11), 3, 1)
    batch["t"] = torch.tensor([1, 30, 700])
    loss, extra = ours(batch)
    loss.backward()

    theirs = UNet2DConditionModel.from_config(pipe.unet.config, out_channels=8)
    theirs.load_state_dict(ours.unet.state_dict())
    scheduler = DDPMScheduler.from_config(
        json.loads((folder / "scheduler/scheduler_config.json").read_text())
    )
    captions = [ours.examples[int(i)].caption for i in batch["example"]]
    ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    x0, noise, t = batch["x0"], batch["noise"], batch["t"]
    x_t = scheduler.add_noise(x0, noise, t)
    with torch.no_grad():
        tokens = copy.deepcopy(pipe.text_encoder)(ids).last_hidden_state
    mean, v = theirs(x_t, t, tokens).sample.chunk(2, dim=1)
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x0, noise, t) if is_v else noise
    simple, vlb = F.mse_loss(mean, target), []
    for i, step in enumerate(t.tolist()):
        true = _posterior(scheduler, x0[i], x_t[i], step)
        at, at_s = scheduler.alphas_cumprod[step], scheduler.alphas_cumprod[step - 1]
        root = (1 - at).sqrt()
        said = mean[i].detach()
        x0_said = at.sqrt() * x_t[i] - root * said if is_v else (x_t[i] - root * said) / at.sqrt()
        guess = _posterior(scheduler, x0_said, x_t[i], step)
        small, large = true[1].log(), (1 - at / at_s).log()
        log_variance = (v[i] + 1) / 2 * large + (1 - v[i]) / 2 * small
        q = torch.distributions.Normal(true[0], true[1].sqrt())
        p = torch.distributions.Normal(guess[0], (log_variance / 2).exp())
        vlb.append(torch.distributions.kl_divergence(q, p).mean() / torch.log(torch.tensor(2.0)))
    vlb = 1000 * torch.stack(vlb).mean()
    (simple + 0.001 * vlb).backward()
    assert float(extra["vlb"]) == pytest.approx(float(vlb.detach()), rel=1e-3)
    assert float(loss.detach()) == pytest.approx(float((simple + 0.001 * vlb).detach()), rel=1e-4)
    for name, p in theirs.named_parameters():
        own = ours.unet.get_parameter(name).grad
        assert float((own - p.grad).abs().max()) < 1e-3 * max(1e-3, float(p.grad.abs().max())), name


def _posterior(scheduler, x0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0), from diffusers' tables; Ho et al. 2020, equation 7."""
    a_t, a_s = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1]
    beta = 1 - a_t / a_s
    mean = (a_s.sqrt() * beta * x0 + (a_t / a_s).sqrt() * (1 - a_s) * x_t) / (1 - a_t)
    return mean, scheduler._get_variance(t)


BOUND = {
    "mode": "full", "variance": "bound", "timestep_sampling": "loss_second_moment", "min_timestep": 500,
    "max_timestep": 502, "max_train_steps": 8, "train_batch_size": 6, "num_validation_images": 0,
}  # fmt: skip


def test_with_timesteps_by_their_losses_a_run_goes_on_bit_for_bit(families, data, tmp_path, monkeypatch):
    """Interrupted before the history is full enough to decide, and again where it is."""
    folder, _ = families("sd1")
    assert run(folder, data, tmp_path / "whole", **BOUND) == 0
    forward, parts = FinetuneTask.forward, tmp_path / "parts"
    for call, step in ((2, 2), (4, 6), (0, 8)):
        monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
        assert run(folder, data, parts, **BOUND) == 0
        assert result(parts)["state"] == f"state-{step:08}"
    assert result(parts) == result(tmp_path / "whole")


def test_what_comes_out_draws_with_its_variance_and_can_be_trained_on(families, data, tmp_path):
    folder, out = families("sd1")[0], tmp_path / "run"
    given = {"mode": "full", "variance": "hybrid", "max_train_steps": 3, "learning_rate": 0.05}
    assert run(folder, data, out, **given) == 0
    pipe = ldm.load(out / "export", device="cpu", dtype="fp32")
    assert pipe.schedule.variance == "learned_range"
    fixed = ldm.load(folder, device="cpu", dtype="fp32")
    assert pipe.unet.config.out_channels == 2 * fixed.unet.config.out_channels
    bias = pipe.unet.conv_out.bias
    assert float((bias[4:] + 1).abs().min()) > 0.01, "it has learned"
    # A LoRA of the mean alone, on the model that says its variance.
    assert run(out / "export", data, tmp_path / "lora") == 0


def test_on_a_model_that_says_its_variance_the_mean_alone_is_trained_by_default(task, families):
    wide = task(families("sd1")[0])
    plain = task(families("sd1")[0], variance="none")
    batch = plain.batch(torch.Generator().manual_seed(11), 3, 1)
    plain.unet.load_state_dict(wide.unet.state_dict() | plain.unet.state_dict())
    narrow = float(plain(batch)[0].detach())
    wide.objective = plain.objective
    assert float(wide(batch)[0].detach()) == pytest.approx(narrow, rel=1e-6)


def test_what_cannot_be_taught_is_told(task, families, data, tmp_path):
    with pytest.raises(UserError, match=r"a LoRA cannot teach a model its variance.*or --mode full"):
        task(families("sd1")[0], mode="lora")
    word = {"mode": "textual_inversion", "placeholder_token": "<it>", "initializer_token": "boat"}
    given = {"train_data_dir": data, "output_dir": tmp_path / "run", "variance": "hybrid"}
    with pytest.raises(ValueError, match="variance trains the U-Net, textual_inversion a word"):
        FinetuneRecipe.model_validate(given | word)


def test_a_widened_models_bound_and_likelihood_are_as_before(families):
    """Its mean is what the likelihood is of, and its variance is the one that the bound had."""
    parts = load_parts(families("sd1")[0], None)
    pipes = [Pipeline.from_parts(each) for each in (parts, widen_output(parts))]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    before, after = (denoising_bounds(pipe, picture, ["red boat"], levels=4)[0].nats for pipe in pipes)
    assert after == pytest.approx(before, rel=1e-5)
    before, after = (picture_bounds(pipe, [picture], ["red boat"], steps=4).pictures for pipe in pipes)
    assert torch.allclose(after, before, rtol=1e-4)
