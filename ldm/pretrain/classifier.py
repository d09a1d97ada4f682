"""Training a classifier of noisy latents: cross-entropy at the noise levels that the denoiser was trained at.

Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 4.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from ldm.checkpoint import save_module
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.models import LatentClassifier
from ldm.postcards.vocabulary import KINDS
from ldm.pretrain.data import Pictures
from ldm.train.loss import PLAIN_LOSS, Levels, draw_noise, draw_timesteps, timestep_probabilities
from ldm.train.task import Batch, Task


def kinds_of(pictures: Pictures) -> Tensor:
    """The one kind of thing in each picture, int64 [N] by number in KINDS. Raises UserError for others."""
    if pictures.labels is None:
        raise UserError("a classifier needs to know what is in its pictures: only rendered postcards say it")
    present = torch.from_numpy(pictures.labels[:, : len(KINDS)].copy()).long()
    if bool((present.sum(1) != 1).any()):
        raise UserError("data.compositions must be one, two and three only: pictures of one kind of thing")
    return present.argmax(1)


class ClassifierTask(Task):
    """Trains a classifier on (latents fp16 [N, c, h, w], classes int64 [N])."""

    def __init__(
        self,
        classifier: LatentClassifier,
        schedule: Schedule,
        train: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__()
        self.classifier, self.train_set, self.held_out = classifier, train, held_out
        self.levels = Levels(schedule)
        self.any_t = timestep_probabilities(PLAIN_LOSS, len(schedule.alphas_cumprod))

    def batch(self, rng: Generator, size: int, number: int = 0) -> Batch:
        latents, classes = self.train_set
        index = torch.randint(len(latents), (size,), generator=rng)
        t = draw_timesteps(self.any_t, size, rng)
        return self._batch(latents[index], classes[index], t, rng)

    def _batch(self, latents: Tensor, classes: Tensor, t: Tensor, rng: Generator) -> Batch:
        x0 = latents.float()
        noise, _ = draw_noise(x0.shape, PLAIN_LOSS, rng)
        sigma = self.levels.sigma.cpu()[t]
        return {"x": x0 + sigma[:, None, None, None] * noise, "sigma": sigma, "classes": classes}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.classifier(batch["x"], batch["sigma"]).float()
        right = (logits.argmax(1) == batch["classes"]).float().mean()
        return F.cross_entropy(logits, batch["classes"]), {"accuracy": right}

    def evaluate(self) -> dict[str, float]:
        """Held-out loss over all noise levels, and accuracy at ten: timesteps 0, 1/9 of all, ... the last."""
        latents, classes = self.held_out
        device, rng = next(self.parameters()).device, Generator().manual_seed(0)
        figures, losses = dict[str, float](), []
        for t in torch.linspace(0, len(self.levels.sigma) - 1, 10).long().tolist():
            batch = self._batch(latents, classes, torch.full((len(latents),), t), rng)
            loss, extra = self({name: each.to(device) for name, each in batch.items()})
            figures[f"accuracy_{t}"] = float(extra["accuracy"])
            losses.append(float(loss))
        return {"held_out_loss": sum(losses) / len(losses), **figures}

    def picture(self, folder: Path) -> Image.Image | None:
        """None: a classifier draws nothing."""
        return None

    def export(self, folder: Path) -> None:
        save_module(self.classifier, folder, torch.float16)
