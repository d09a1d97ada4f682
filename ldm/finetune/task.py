"""What a step of fine-tuning is: a batch of pictures, its loss, and its validation on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import Parts
from ldm.dataset.buckets import Sample
from ldm.dataset.cache import open_and_crop
from ldm.dataset.feed import Feed
from ldm.dataset.findings import Example
from ldm.diffusion.schedule import Schedule
from ldm.finetune.blocks import block_of, check_blocks
from ldm.finetune.inpainting import inpainting_input
from ldm.finetune.lora import scaled
from ldm.finetune.modes import TEXT_ENCODERS, Mode
from ldm.finetune.pictures import Splits
from ldm.finetune.recipe import FinetuneRecipe
from ldm.images.pixels import contact_sheet, to_pil
from ldm.models.attention import AnyText
from ldm.models.encoder import NO_RESIDUALS, Residuals
from ldm.pipeline import Pipeline
from ldm.runtime import Runtime, memory_format
from ldm.train.loss import PLAIN_LOSS, draw_noise, noisy_latents, prior_preservation_loss
from ldm.train.task import Batch, Task
from ldm.train.variance import Objective

LEVELS = 8  # noise levels at which each held-out picture is tried
PRIOR = "prior."  # before the names of what is of the class's pictures, in a batch
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FinetuneTask(Task):
    """Trains what of `parts` has gradients."""

    validates_first, draws_from_export = True, False
    judged_by = "held_out_loss"

    def __init__(self, parts: Parts, mode: Mode, recipe: FinetuneRecipe, feed: Feed, splits: Splits) -> None:
        super().__init__()
        self.parts, self.mode, self.recipe, self.feed, self.splits = parts, mode, recipe, feed, splits
        self.shows_originals = feed.masks is not None
        self.unet, self.text_encoder, self.text_encoder_2 = (
            parts.unet,
            parts.text_encoder,
            parts.text_encoder_2,
        )
        self.schedule = Schedule.from_config(dict(parts.scheduler))
        self.steps = len(self.schedule.alphas_cumprod)
        self.objective = Objective(self.schedule, recipe)
        self.examples = [*splits.train.examples, *(splits.prior.examples if splits.prior else ())]
        self.number = {example: i for i, example in enumerate(self.examples)}
        self.facts = {"pictures": _fingerprint(self.examples)}
        self.shards = recipe.mode in ("lora", "full")
        if feed.weights is not None:
            self.facts["mask_files"] = feed.weights.fingerprint

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        blocks = self.recipe.block_lrs
        trained = {name: getattr(self, name) for name in ("unet", *TEXT_ENCODERS) if self._trains(name)}
        check_blocks("block_lr", blocks, trained)
        groups: list[dict[str, Any]] = [
            {"params": list(module.parameters()), "lr": lr, "muon": True} for module in self.mode.beside
        ]
        for name in ("unet", *TEXT_ENCODERS):
            module = getattr(self, name)
            own = lr if name == "unet" else self.recipe.text_encoder_lr or lr
            rates: dict[float, list[Tensor]] = {}
            for path, p in () if module is None else module.named_parameters():
                if p.requires_grad:
                    block = block_of(path, blocks) if name == "unet" else name
                    rates.setdefault(blocks.get(block or "", own), []).append(p)
            # Rows of an embedding are rarely seen: Muon would pull them as hard as the others.
            groups += [{"params": some, "lr": rate, "muon": name == "unet"} for rate, some in rates.items()]
        return groups

    def _trains(self, name: str) -> bool:
        module = getattr(self, name)
        return module is not None and (name == "unet" or any(p.requires_grad for p in module.parameters()))

    def batch(self, rng: torch.Generator, size: int, number: int) -> Batch:
        batch = self._noised(self.splits.train.at(number), rng)
        if self.splits.prior is not None:
            prior = self._noised(self.splits.prior.at(number), rng)
            batch |= {PRIOR + name: value for name, value in prior.items()}
        return batch

    def _noised(self, samples: Sequence[Sample], rng: torch.Generator) -> Batch:
        batch = self.feed.tensors(samples, rng)
        batch |= self.objective.draw(len(samples), rng)
        batch["noise"], batch["input_noise"] = draw_noise(batch["x0"].shape, self.recipe, rng)
        batch["example"] = torch.tensor([self.number[sample.example] for sample in samples])
        return batch

    def names(self, batch: Batch) -> list[str]:
        numbers = [
            number for name in ("example", f"{PRIOR}example") if name in batch for number in batch[name]
        ]
        return [str(self.examples[int(number)].path) for number in numbers]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, extra = self._losses(batch)
        if self.splits.prior is None:
            return losses.mean(), extra
        prior, _ = self._losses({k.removeprefix(PRIOR): v for k, v in batch.items() if k.startswith(PRIOR)})
        loss = prior_preservation_loss(torch.cat([losses, prior]), self.recipe.prior_loss_weight)
        return loss, {**extra, "prior_loss": prior.mean().detach()}

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Of each picture, weighted, [B]; and what to log."""
        batch = batch | {"t": self.objective.timesteps(batch)}
        found: tuple[Tensor, dict[str, Tensor]] = self.objective(self._predict(batch), batch)
        return found

    def _predict(self, batch: Batch) -> Tensor:
        """What the U-Net answers to the noisy latents of `batch`, on its conditioning."""
        t = batch["t"]
        sample = noisy_latents(batch["x0"], batch["input_noise"], t, self.objective.levels)
        if "mask" in batch:
            sample = inpainting_input(sample, batch["mask"], batch["masked"])
        cond, dtype = self.feed.conditioning(batch), self.unet.conv_in.weight.dtype
        told = (sample.to(dtype, memory_format=memory_format(sample.device)), t, cond.tokens.to(dtype))
        pooled = None if cond.pooled is None else cond.pooled.to(dtype)
        beside: dict[str, Any] = {"pooled": pooled, "time_ids": cond.time_ids}
        residuals, text = self._residuals(batch, told, beside), self._text(batch, told[2])
        output: Tensor = self.unet(*told[:2], text, **beside, residuals=residuals)
        return output

    def _text(self, batch: Batch, tokens: Tensor) -> AnyText:
        """What cross-attention reads, of the text's tokens [B, N, D]."""
        return tokens

    def _residuals(
        self, batch: Batch, told: tuple[Tensor, Tensor, Tensor], beside: dict[str, Any]
    ) -> Residuals:
        """What a network beside the U-Net, which is told the same, adds to its features."""
        return NO_RESIDUALS

    # --- validation ---------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """The plain loss of held-out pictures, each at the same noise and noise levels every time.

        Plain, so that runs can be compared whatever they are trained with; of what masks show, if they do.
        """
        if not self.splits.held_out:
            return {}
        total = sum(self._held_out_loss(sample) for sample in self.splits.held_out)
        return {"held_out_loss": total / len(self.splits.held_out)}

    def _held_out_loss(self, sample: Sample) -> float:
        rng = torch.Generator().manual_seed(int(sample.example.digest[:15], 16))
        levels = ((torch.arange(LEVELS) + 0.5) / LEVELS * self.steps).long()
        # One by one, so that what is drawn does not depend on the size of batches.
        batches = [self._noised_at(sample, t, rng) for t in levels[:, None]]
        total, size = 0.0, self.recipe.train_batch_size
        for some in (batches[first : first + size] for first in range(0, LEVELS, size)):
            batch = {name: torch.cat([each[name] for each in some]).to(self.device) for name in some[0]}
            with self._autocast():
                total += float(self.objective.plain(self._predict(batch), batch).sum())
        return total / LEVELS

    def _noised_at(self, sample: Sample, t: Tensor, rng: torch.Generator) -> Batch:
        batch = self.feed.tensors([sample], rng)
        noise, _ = draw_noise(batch["x0"].shape, PLAIN_LOSS, rng)
        return batch | {"t": t, "noise": noise, "input_noise": noise}

    def picture(self, folder: Path) -> Image.Image | None:
        """The validation prompts, a row for each, drawn with the modules as they are.

        Of a LoRA at each of its weights, one after the other.
        """
        parts = replace(self.parts, world=None)  # words are told as they are learnt
        pipe = Pipeline.from_parts(parts, Runtime(self.device, self.dtype))
        count, drawn = self.recipe.num_validation_images, list[Image.Image]()
        if not count:
            return None
        for i, prompt in enumerate(self.recipe.validation_prompts):
            more, beside = self._drawn_from(i, folder)
            drawn += beside
            for scale in self.recipe.validation_lora_scales:
                with self._autocast(), scaled((self.unet, self.text_encoder, self.text_encoder_2), scale):
                    drawn += pipe(
                        prompt,
                        seed=list(range(count)),
                        num_images_per_prompt=count,
                        num_inference_steps=self.recipe.validation_inference_steps,
                        **more,
                    ).images
        columns = len(drawn) // max(1, len(self.recipe.validation_prompts))
        return contact_sheet(drawn, columns) if drawn else None

    def _drawn_from(self, i: int, folder: Path) -> tuple[dict[str, Any], list[Image.Image]]:
        """What the pictures of prompt i are drawn from, and what is shown of that beside them.

        A size, or a picture whose middle is drawn anew.
        """
        if self.feed.masks is None:
            side = max(self.recipe.resolution)
            return {"height": side, "width": side}, []
        samples = self.splits.held_out or self.splits.train.at(0)
        sample = samples[i % len(samples)]
        image = to_pil(open_and_crop(sample.example, sample.crop)[None] / 2 + 0.5)[0]
        mask = Image.new("L", image.size)
        mask.paste(255, (image.width // 4, image.height // 4, image.width * 3 // 4, image.height * 3 // 4))
        return {"image": image, "mask_image": mask}, []

    def _example(self, i: int) -> Example:
        """The picture whose caption is prompt i, else the i-th: of those held out, if there are any."""
        examples = [each.example for each in self.splits.held_out] or self.splits.train.examples
        own = (each for each in examples if each.caption == self.recipe.validation_prompts[i])
        return next(own, examples[i % len(examples)])

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
    facts = [(each.digest, each.caption, each.repeats) for each in examples]
    return f"{len(facts)} {hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
