"""Training an IP-Adapter: the step of fine-tuning, with a picture read beside the text of a U-Net that stays.

    loss(U-Net(noisy latents, text, tokens of the picture itself))

Ye et al. 2023, "IP-Adapter", section 3.2.3: the text is left out by the recipe's caption_dropout, the picture
by its image_dropout, and guidance has a branch without either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import Parts
from ldm.dataset.buckets import Sample
from ldm.dataset.feed import Feed
from ldm.finetune.modes import ADAPTER, ImagePromptMode, Mode
from ldm.finetune.pictures import Splits
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.images.opening import open_picture
from ldm.models.attention import AnyText, Context, Site, attend
from ldm.train.task import Batch


class ImagePromptTask(FinetuneTask):
    """Trains the IP-Adapter of `mode`."""

    shows_originals, draws_from_export = True, True

    def __init__(self, parts: Parts, mode: Mode, recipe: FinetuneRecipe, feed: Feed, splits: Splits) -> None:
        super().__init__(parts, mode, recipe, feed, splits)
        assert isinstance(mode, ImagePromptMode)
        self.adapter, self.encoder = mode.network, mode.encoder
        self.facts = {**self.facts, "image_encoder_sha256": mode.encoder.sha256}
        self._known: dict[str, Tensor] = {}  # by a picture's digest: what the encoder makes of it, [E]

    def _noised(self, samples: Sequence[Sample], rng: torch.Generator) -> Batch:
        batch = super()._noised(samples, rng)
        kept = torch.rand(len(samples), generator=rng) >= self.recipe.image_dropout
        return batch | {"image": self._embeddings(samples) * kept[:, None]}

    def _noised_at(self, sample: Sample, t: Tensor, rng: torch.Generator) -> Batch:
        return super()._noised_at(sample, t, rng) | {"image": self._embeddings([sample])}

    def _text(self, batch: Batch, tokens: Tensor) -> AnyText:
        seen = self.adapter.image_proj(batch["image"])

        def both(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q, k, v)
            if not site.cross:
                return out
            return out + attend(q, *self.adapter.keys_and_values(site.layer, seen.to(q.dtype)))

        return Context(tokens, both)

    @torch.no_grad()
    def _embeddings(self, samples: Sequence[Sample]) -> Tensor:
        """[B, E] of whole pictures, on the CPU; each is read once."""
        for example in {sample.example for sample in samples}:
            if example.digest not in self._known:
                pixels = self.encoder.prepared([example.open()]).to(self.device)
                network = self.encoder.network(self.device, torch.float32)
                self._known[example.digest] = network(pixel_values=pixels).image_embeds[0].cpu()
        return torch.stack([self._known[sample.example.digest] for sample in samples])

    def _drawn_from(self, i: int, folder: Path) -> tuple[dict[str, Any], list[Image.Image]]:
        """The picture that goes with prompt i."""
        example = self._example(i)
        use = {"adapter": str(folder / ADAPTER), "images": [str(example.path)]}
        use["image_encoder"] = str(self.encoder.folder)
        side = max(self.recipe.resolution)
        return {"image_prompts": [use], "height": side, "width": side}, [open_picture(example.path)]
