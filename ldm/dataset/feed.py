"""Rows become tensors: pictures as latents, captions as embeddings, or as ids if the text encoder learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.dataset.buckets import Sample
from ldm.dataset.cache import LatentCache, TextCache, open_and_crop
from ldm.dataset.controls import Controls
from ldm.dataset.masks import masked_pictures, random_masks
from ldm.dataset.weights import Weights
from ldm.models import VAE
from ldm.models.conditioning import Conditioning
from ldm.pipeline.networks import encode
from ldm.prompts.text_encoder import TextEncoder
from ldm.train.loss_recipe import MaskSection


@dataclass(frozen=True, eq=False)
class Feed:
    """How a model is fed. What is not kept in a cache is made anew each time.

    takes: what the U-Net is told beside the text, as `UNetConfig.conditioning` names it.
    zeros_for_empty: an empty caption is zeros, as SDXL is drawn with.
    masks: of inpainting; None for other models.
    controls: of a ControlNet; None without one.
    weights: of places of pictures in the loss; None where all count alike.
    """

    vae: VAE
    text: TextEncoder
    takes: frozenset[str]
    zeros_for_empty: bool = False
    latents: LatentCache | None = None
    texts: TextCache | None = None
    trains_text: bool = False
    masks: MaskSection | None = None
    controls: Controls | None = None
    weights: Weights | None = None

    def tensors(self, rows: Sequence[Sample], rng: torch.Generator) -> dict[str, Tensor]:
        """What B rows of one size give, on the CPU in fp32; noise is drawn from `rng`.

        x0 [B, c, h, w]: latents, scaled as the U-Net has them; tokens [B, N, D] or ids.<i> [B * windows, N];
        where the model takes them pooled [B, P], time_ids [B, 6], mask [B, 1, H, W] and masked [B, c, h, w];
        kept [B]: 0 where the text is to be zeros; control [B, 3, H, W] in 0..1; weight [B, h, w].
        """
        shown = [(row.example, row.crop) for row in rows]
        whole = self.latents is None or self.masks is not None or self.controls is not None
        pictures = torch.stack([open_and_crop(*each) for each in shown]) if whole else torch.empty(0)
        encoded = encode(self.vae, pictures / 2 + 0.5) if self.latents is None else self.latents.read(shown)
        batch = {"x0": encoded.sample(torch.randn(encoded.mean.shape, generator=rng)).cpu()}
        batch |= self._text([row.caption for row in rows])
        if "time_ids" in self.takes:
            batch["time_ids"] = torch.tensor([row.crop.time_ids for row in rows], dtype=torch.float32)
        if self.masks is not None:
            mask = random_masks(len(rows), rows[0].crop.size, rng, self.masks)
            masked = encode(self.vae, masked_pictures(pictures, mask) / 2 + 0.5)
            noise = torch.randn(masked.mean.shape, generator=rng)
            batch |= {"mask": mask, "masked": masked.sample(noise).cpu()}
        if self.controls is not None:
            told = [self.controls.of(*each, picture) for each, picture in zip(shown, pictures, strict=True)]
            batch["control"] = torch.stack(told)
        if self.weights is not None:
            batch["weight"] = torch.stack([self.weights.of(*each, self.vae.downscale) for each in shown])
        return batch

    def _text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        batch = {}
        if self.zeros_for_empty:
            batch["kept"] = torch.tensor([float(caption != "") for caption in captions])
        if self.trains_text:
            return batch | {f"ids.{i}": ids for i, ids in enumerate(self.text.tokenise(captions))}
        told = self.text.encode(captions) if self.texts is None else self.texts.read(captions)
        batch["tokens"] = told.tokens.cpu()
        if "pooled" in self.takes and told.pooled is not None:
            batch["pooled"] = told.pooled.cpu()
        return batch

    def conditioning(self, batch: dict[str, Tensor]) -> Conditioning:
        """What the U-Net is told of a batch, with gradients where the text encoder learns."""
        tokens, pooled = batch.get("tokens"), batch.get("pooled")
        if tokens is None:
            ids = [batch[f"ids.{i}"] for i in range(len(self.text.clips))]
            told = self.text.read(ids, len(ids[0]) // len(batch["x0"]))
            tokens, pooled = told.tokens, told.pooled if "pooled" in self.takes else None
        if "kept" in batch:
            tokens = tokens * batch["kept"][:, None, None]
            pooled = None if pooled is None else pooled * batch["kept"][:, None]
        return Conditioning(tokens, pooled, batch.get("time_ids"))
