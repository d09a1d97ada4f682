"""What a step of fine-tuning is: a batch of pictures, its loss, and what one looks at on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import Parts
from ldm.dataset.buckets import Batches, Row
from ldm.dataset.cache import open_and_cut
from ldm.dataset.feed import Feed
from ldm.dataset.findings import Example
from ldm.diffusion.schedule import Schedule
from ldm.finetune.inpainting import inpainting_input
from ldm.finetune.modes import TEXT_ENCODERS, Mode
from ldm.finetune.recipe import FinetuneRecipe
from ldm.images.pixels import contact_sheet, to_pil
from ldm.pipeline import Pipeline
from ldm.runtime import Runtime, memory_format
from ldm.train.loss import (
    Levels,
    draw_noise,
    draw_timesteps,
    noisy_latents,
    pixel_losses,
    prior_preservation_loss,
    timestep_probabilities,
    training_target,
)
from ldm.train.recipe import LossSection
from ldm.train.task import Batch, Task

LEVELS = 8  # noise levels at which each held-out picture is looked at
PLAIN = LossSection()  # of the held-out loss, so that runs can be compared whatever they are trained with
PRIOR = "prior."  # before the names of what is of the class's pictures, in a batch
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shows:
    """Which pictures are shown: to train on, of the class beside them, and held out."""

    train: Batches
    prior: Batches | None
    held_out: tuple[Row, ...]


class FinetuneTask(Task):
    """Trains what of `parts` has gradients."""

    looks_first, draws_from_export = True, False

    def __init__(self, parts: Parts, mode: Mode, recipe: FinetuneRecipe, feed: Feed, shows: Shows) -> None:
        super().__init__()
        self.parts, self.mode, self.recipe, self.feed, self.shows = parts, mode, recipe, feed, shows
        self.unet, self.text_encoder, self.text_encoder_2 = (
            parts.unet,
            parts.text_encoder,
            parts.text_encoder_2,
        )
        self.schedule = Schedule.from_config(dict(parts.scheduler))
        self.steps = len(self.schedule.alphas_cumprod)
        self.levels = Levels(self.schedule, recipe)
        self.probabilities = timestep_probabilities(recipe, self.steps)
        self.examples = [*shows.train.examples, *(shows.prior.examples if shows.prior else ())]
        self.number = {example: i for i, example in enumerate(self.examples)}
        self.facts = {"pictures": _fingerprint(self.examples)}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        groups = []
        for name in ("unet", *TEXT_ENCODERS):
            module = getattr(self, name)
            params = [] if module is None else [p for p in module.parameters() if p.requires_grad]
            if params:
                own = lr if name == "unet" else self.recipe.text_encoder_lr or lr
                # Rows of an embedding are rarely seen: Muon would pull them as hard as the others.
                groups.append({"params": params, "lr": own, "muon": name == "unet"})
        return groups

    def batch(self, rng: torch.Generator, size: int, number: int) -> Batch:
        batch = self._noised(self.shows.train.at(number), rng)
        if self.shows.prior is not None:
            prior = self._noised(self.shows.prior.at(number), rng)
            batch |= {PRIOR + name: value for name, value in prior.items()}
        return batch

    def _noised(self, rows: Sequence[Row], rng: torch.Generator) -> Batch:
        batch = self.feed.tensors(rows, rng)
        batch["t"] = draw_timesteps(self.probabilities, len(rows), rng)
        batch["noise"], batch["input_noise"] = draw_noise(batch["x0"].shape, self.recipe, rng)
        batch["example"] = torch.tensor([self.number[row.example] for row in rows])
        return batch

    def names(self, batch: Batch) -> list[str]:
        numbers = [
            number for name in ("example", f"{PRIOR}example") if name in batch for number in batch[name]
        ]
        return [str(self.examples[int(number)].path) for number in numbers]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self._losses(batch)
        if self.shows.prior is None:
            return losses.mean(), {}
        prior = self._losses({k.removeprefix(PRIOR): v for k, v in batch.items() if k.startswith(PRIOR)})
        loss = prior_preservation_loss(torch.cat([losses, prior]), self.recipe.prior_loss_weight)
        return loss, {"prior_loss": prior.mean().detach()}

    def _losses(self, batch: Batch) -> Tensor:
        """Of each picture, weighted: [B]."""
        return self.levels.weight[batch["t"]] * self._errors(batch, self.recipe)

    def _errors(self, batch: Batch, options: LossSection) -> Tensor:
        x0, t = batch["x0"], batch["t"]
        sample = noisy_latents(x0, batch["input_noise"], t, self.levels)
        if "mask" in batch:
            sample = inpainting_input(sample, batch["mask"], batch["masked"])
        told, dtype = self.feed.conditioning(batch), self.unet.conv_in.weight.dtype
        output = self.unet(
            sample.to(dtype, memory_format=memory_format(sample.device)),
            t,
            told.tokens.to(dtype),
            pooled=None if told.pooled is None else told.pooled.to(dtype),
            time_ids=told.time_ids,
        )
        target = training_target(x0, batch["noise"], t, self.levels)
        return pixel_losses(output, target, options).mean((1, 2))

    # --- looking ------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """The plain loss of held-out pictures, each at the same noise and noise levels every time."""
        if not self.shows.held_out:
            return {}
        total = sum(self._held_out_loss(row) for row in self.shows.held_out)
        return {"held_out_loss": total / len(self.shows.held_out)}

    def _held_out_loss(self, row: Row) -> float:
        rng = torch.Generator().manual_seed(int(row.example.digest[:15], 16))
        levels = ((torch.arange(LEVELS) + 0.5) / LEVELS * self.steps).long()
        # One by one, so that what is drawn does not depend on the size of batches.
        looks = [self._look(row, t, rng) for t in levels[:, None]]
        total, size = 0.0, self.recipe.train_batch_size
        for some in (looks[first : first + size] for first in range(0, LEVELS, size)):
            batch = {name: torch.cat([look[name] for look in some]).to(self.device) for name in some[0]}
            with self._autocast():
                total += float(self._errors(batch, PLAIN).sum())
        return total / LEVELS

    def _look(self, row: Row, t: Tensor, rng: torch.Generator) -> Batch:
        batch = self.feed.tensors([row], rng)
        noise, _ = draw_noise(batch["x0"].shape, PLAIN, rng)
        return batch | {"t": t, "noise": noise, "input_noise": noise}

    def picture(self, folder: Path) -> Image.Image | None:
        """The validation prompts, a row for each, drawn with the modules as they are."""
        pipe = Pipeline.from_parts(self.parts, Runtime(self.device, self.dtype))
        count, drawn = self.recipe.num_validation_images, []
        if not count:
            return None
        for i, prompt in enumerate(self.recipe.validation_prompts):
            more: dict[str, Any] = {"height": self.recipe.resolution, "width": self.recipe.resolution}
            if self.feed.masks is not None:
                more = self._to_fill(i)
            with self._autocast():
                drawn += pipe(
                    prompt,
                    seed=list(range(count)),
                    num_images_per_prompt=count,
                    num_inference_steps=self.recipe.validation_inference_steps,
                    **more,
                ).images
        return contact_sheet(drawn, columns=count) if drawn else None

    def _to_fill(self, i: int) -> dict[str, Any]:
        """A picture of the folder whose middle is to be drawn anew."""
        rows = self.shows.held_out or self.shows.train.at(0)
        row = rows[i % len(rows)]
        image = to_pil(open_and_cut(row.example, row.crop)[None] / 2 + 0.5)[0]
        mask = Image.new("L", image.size)
        mask.paste(255, (image.width // 4, image.height // 4, image.width * 3 // 4, image.height * 3 // 4))
        return {"image": image, "mask_image": mask}

    def export(self, folder: Path) -> None:
        self.mode.export(self.parts, folder)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What networks compute in."""
        return DTYPES[self.recipe.mixed_precision or "no"]

    def _autocast(self) -> torch.autocast:
        """As accelerate wraps `forward`; weights that are trained are in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)


def _fingerprint(examples: Sequence[Example]) -> str:
    """Of the pictures and captions that are trained on: a folder that has changed is told on resuming."""
    told = [(each.digest, each.caption, each.repeats) for each in examples]
    return f"{len(told)} {hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"
