"""One optimisation step against plain torch with diffusers' U-Net and DDPMScheduler: loss, gradients, step.

The reference follows diffusers' train_text_to_image.py line by line, on the same batch, noise and timesteps.
"""

import copy
import json

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from tiny_families import NARROW, POOLED, WIDE

from ldm.diffusion.schedule import Schedule
from ldm.models.unet import UNet
from ldm.train.loss import (
    Levels,
    draw_noise,
    noisy_latents,
    pixel_losses,
    training_target,
)
from ldm.train.loss_recipe import LossSection
from ldm.train.memory import checkpoint_blocks
from ldm.train.optimiser import make_optimiser
from ldm.train.recipe import OptimiserSection

WIDTHS = {"sd1": NARROW, "inpaint": NARROW, "zero_terminal": NARROW, "sd2_v": WIDE, "sdxl": NARROW + WIDE}
TIMESTEPS = torch.tensor([3, 250, 600, 999])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Case:
    """A family's two U-Nets of the same weights, its two schedulers, and a batch of four."""

    def __init__(self, families, name, prediction=None, dtype=torch.float32):
        folder, pipe = families(name)
        self.theirs = copy.deepcopy(pipe.unet).to(dtype).train()
        self.ours = UNet.from_config(json.loads((folder / "unet" / "config.json").read_text()))
        self.ours.to(dtype).train()
        self.ours.load_state_dict(self.theirs.state_dict())
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        if prediction:
            config["prediction_type"] = prediction
        self.schedule = Schedule.from_config(config)
        self.scheduler = DDPMScheduler.from_config(config)
        rng = generator(3)
        self.x0 = torch.randn(4, 4, 8, 8, generator=rng, dtype=dtype)
        self.tokens = torch.randn(4, 7, WIDTHS[name], generator=rng, dtype=dtype)
        self.beside = torch.randn(4, self.ours.config.in_channels - 4, 8, 8, generator=rng, dtype=dtype)
        self.added = None
        if name == "sdxl":
            sizes = torch.randint(0, 1024, (4, 6), generator=rng).float()
            self.added = {
                "text_embeds": torch.randn(4, POOLED, generator=rng, dtype=dtype),
                "time_ids": sizes,
            }

    def our_losses(self, options, rows=slice(None)):
        """Weighted losses [B] of some of the batch, as the trainer's forward makes them."""
        noise, input_noise = (n[rows] for n in draw_noise(self.x0.shape, options, generator(5)))
        x0, t, levels = self.x0[rows], TIMESTEPS[rows], Levels(self.schedule, options)
        sample = torch.cat([noisy_latents(x0, input_noise, t, levels), self.beside[rows]], 1)
        told = {}
        if self.added:
            told = {"pooled": self.added["text_embeds"][rows], "time_ids": self.added["time_ids"][rows]}
        output = self.ours(sample, t, self.tokens[rows], **told)
        target = training_target(x0, noise, t, levels)
        losses = pixel_losses(output, target, options).mean((1, 2))
        return levels.weight[t] * losses

    def their_loss(self, snr_gamma=None, noise_offset=0.0, input_perturbation=0.0):
        rng, x0, t, scheduler = generator(5), self.x0, TIMESTEPS, self.scheduler
        noise = torch.randn(x0.shape, generator=rng)
        if noise_offset:
            noise += noise_offset * torch.randn((x0.shape[0], x0.shape[1], 1, 1), generator=rng)
        new_noise = noise
        if input_perturbation:
            new_noise = noise + input_perturbation * torch.randn(x0.shape, generator=rng)
        noisy = torch.cat([scheduler.add_noise(x0, new_noise, t), self.beside], 1)
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = scheduler.get_velocity(x0, noise, t)
        else:
            target = x0
        output = self.theirs(noisy, t, self.tokens, added_cond_kwargs=self.added).sample
        if snr_gamma is None:
            return torch.nn.functional.mse_loss(output.float(), target.float(), reduction="mean")
        snr = compute_snr(scheduler, t)
        weights = torch.stack([snr, snr_gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
        if kind == "epsilon":
            weights = weights / snr
        elif kind == "v_prediction":
            weights = weights / (snr + 1)
        loss = torch.nn.functional.mse_loss(output.float(), target.float(), reduction="none")
        return (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()


def gradients(unet):
    return {name: p.grad.clone() for name, p in unet.named_parameters()}


def worst(ours, theirs):
    """Over all tensors: max |a - b| / max |b|."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)


@pytest.mark.parametrize(
    ("family", "prediction", "options"),
    [
        ("sd1", None, {}),
        ("sd1", None, {"snr_gamma": 5.0, "noise_offset": 0.1, "input_perturbation": 0.1}),
        ("sd1", "v_prediction", {"snr_gamma": 5.0}),
        ("sd1", "sample", {}),
        ("sd1", "sample", {"snr_gamma": 5.0}),
        ("inpaint", None, {"noise_offset": 0.1}),
        ("sd2_v", None, {}),
        ("sd2_v", None, {"snr_gamma": 5.0, "input_perturbation": 0.1}),
        ("zero_terminal", None, {}),
        ("zero_terminal", None, {"snr_gamma": 5.0, "noise_offset": 0.1}),
        ("sdxl", None, {"snr_gamma": 5.0}),
    ],
)
def test_one_step_equals_diffusers(families, family, prediction, options):
    case = Case(families, family, prediction)
    loss = case.our_losses(LossSection(**options)).mean()
    loss.backward()
    reference = case.their_loss(**options)
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert worst(gradients(case.ours), gradients(case.theirs)) < 1e-5

    # Adam's first step is the gradient's sign but for epsilon: a small one makes steps of rounding errors.
    make_optimiser(case.ours.parameters(), OptimiserSection(adam_epsilon=1e-5)).step()
    torch.optim.AdamW(case.theirs.parameters(), lr=1e-4, eps=1e-5).step()
    assert worst(case.ours.state_dict(), case.theirs.state_dict()) < 1e-5
    assert worst(case.ours.state_dict(), families(family)[1].unet.state_dict()) > 1e-5  # it moved


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_checkpointed_blocks_and_accumulation_give_the_same_gradients(families, family):
    case, options = Case(families, family, dtype=torch.float64), LossSection(snr_gamma=5.0)
    case.our_losses(options).mean().backward()
    expected = gradients(case.ours)
    calls = []
    for block in (*case.ours.down_blocks, *case.ours.up_blocks, case.ours.mid_block):
        block.resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))

    case.ours.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        (case.our_losses(options, rows).mean() / 2).backward()
    assert worst(gradients(case.ours), expected) < 1e-6
    plain = len(calls) // 2  # of one forward

    case.ours.zero_grad()
    checkpoint_blocks(case.ours)
    forward = case.ours.mid_block.resnets[0].forward
    checkpoint_blocks(case.ours)
    assert case.ours.mid_block.resnets[0].forward is forward  # not wrapped twice
    calls.clear()
    loss = case.our_losses(options).mean()
    assert len(calls) == plain
    loss.backward()
    assert len(calls) == 2 * plain  # made again for the backward pass
    assert worst(gradients(case.ours), expected) < 1e-6
    with torch.no_grad():
        assert torch.equal(case.our_losses(options).mean(), loss)
