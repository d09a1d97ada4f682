"""Distilling a U-Net into a student of a few steps without guidance.

One step of the student goes where several guided steps of its teacher go. With x_s where these end, starting
from x_t, and x0* the x0 with which one DDIM step from x_t ends there too, the student learns the velocity of
x0*: Salimans and Ho 2022, "Progressive Distillation" (arXiv 2202.00512), algorithm 2, in one go instead of
halving after halving; Meng et al. 2023, "On Distillation of Guided Diffusion Models" (arXiv 2210.03142), for
one scale.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import Parts, save_folder
from ldm.diffusion.prediction import Prediction
from ldm.errors import UserError
from ldm.models import UNet
from ldm.pretrain.data import digest_of
from ldm.pretrain.unet import LatentDataset, UNetTask
from ldm.runtime import memory_format
from ldm.train.loss import PLAIN_LOSS, noisy_latents, pixel_losses
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch


class DistilTask(UNetTask):
    """Trains a copy of a pipeline's U-Net; its text encoder stays as it is.

    loss keys: steps (of the student), substeps (of the teacher in one of them), guidance (its scale),
    object_weight.

    Raises:
        UserError: for a schedule that the student's steps do not fit.
    """

    def __init__(
        self,
        parts: Parts,
        train: LatentDataset,
        held_out: LatentDataset,
        loss: dict[str, float],
        prompts: list[str],
    ) -> None:
        defaults = {"steps": 4.0, "substeps": 3.0, "guidance": 3.0, "object_weight": 2.0}
        weights = loss_settings(defaults, loss)
        others = {"object_weight": weights["object_weight"], "drop": 0.0, "text_lr": 0.0}
        super().__init__(parts, train, held_out, others, prompts)
        if self.schedule.prediction is not Prediction.V or self.schedule.alphas_cumprod[-1] > 0:
            raise UserError("a student is distilled with v_prediction and rescale_betas_zero_snr")
        steps, substeps, total = weights["steps"], weights["substeps"], len(self.schedule.alphas_cumprod)
        if steps % 1 or substeps % 1 or not 1 <= steps * substeps <= total:
            raise UserError(
                f"loss.steps and loss.substeps must be whole numbers of a product from 1 to {total} "
                f"(got {steps:g} and {substeps:g})"
            )
        self.steps, self.substeps, self.guidance = int(steps), int(substeps), weights["guidance"]
        count = self.steps * self.substeps
        self.teacher = copy.deepcopy(self.unet).requires_grad_(False)
        self.unet.requires_grad_()
        with torch.no_grad():
            self.nothing = self.text_encoder(input_ids=self.empty_prompt[None]).last_hidden_state
        # The teacher's timesteps, as trailing spacing has them, and beyond the last no noise at all.
        self.grid = torch.tensor([round(total - i * total / count) - 1 for i in range(count)])
        signal = torch.cat([self.schedule.alphas_cumprod[self.grid], torch.ones(1, dtype=torch.float64)])
        self.scales = torch.stack([signal.sqrt(), (1 - signal).sqrt()]).float()
        self.facts = {**self.facts, "model.teacher": digest_of(self.teacher)}

    def batch(self, rng: torch.Generator, size: int, number: int = 0) -> Batch:
        batch = super().batch(rng, size, number)
        step = torch.randint(self.steps, (size,), generator=rng)
        return batch | {"step": step, "t": self.grid[step * self.substeps]}

    def _pixel_losses(self, batch: Batch) -> Tensor:
        tokens = self.text_encoder(input_ids=batch["ids"]).last_hidden_state
        x = noisy_latents(batch["x0"], batch["noise"], batch["t"], self.levels)
        target = self._target(x, batch["step"], tokens)
        return pixel_losses(self._velocity(self.unet, x, batch["t"], tokens), target, PLAIN_LOSS)

    @torch.no_grad()
    def _target(self, x: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
        """The velocity that goes, in one DDIM step from x [B, c, h, w], where the teacher goes in several."""
        nothing = self.nothing.to(tokens).expand(len(x), -1, -1)
        grid, scales = self.grid.to(x.device), self.scales.to(x.device)
        y, first = x, step * self.substeps
        for i in range(self.substeps):
            t = grid[first + i]
            with_text, without = (self._velocity(self.teacher, y, t, each) for each in (tokens, nothing))
            v = without + self.guidance * (with_text - without)
            alpha, sigma = scales[:, first + i, None, None, None]
            x0, noise = alpha * y - sigma * v, sigma * y + alpha * v
            alpha, sigma = scales[:, first + i + 1, None, None, None]
            y = alpha * x0 + sigma * noise
        alpha_t, sigma_t = scales[:, first, None, None, None]
        x0 = (y - sigma / sigma_t * x) / (alpha - sigma / sigma_t * alpha_t)
        velocity: Tensor = (alpha_t * x - x0) / sigma_t
        return velocity

    @staticmethod
    def _velocity(unet: UNet, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        answer: Tensor = unet(x.contiguous(memory_format=memory_format(x.device)), t, tokens)
        return answer.float()

    def evaluate(self) -> dict[str, float]:
        """How far the student is from its teacher on held-out pictures, at each of its steps."""
        data, rng = self.held_out, torch.Generator().manual_seed(0)
        index = torch.arange(min(64, len(data)))
        found = {}
        for number in range(self.steps):
            step = torch.full_like(index, number)
            t = self.grid[step * self.substeps]
            batch = self._batch(data, index, data.token_ids[index, 0].long(), t, rng) | {"step": step}
            found[f"held_out_mse_{number + 1}"] = self._mse(batch)
        return found | {"held_out_mse": sum(found.values()) / self.steps}

    def export(self, folder: Path) -> None:
        defaults = replace(
            self.parts.defaults,
            num_inference_steps=self.steps,
            guidance_scale=1.0,
            sampler="ddim",
            spacing="trailing",
        )
        save_folder(folder, replace(self.parts, defaults=defaults), torch.bfloat16)
