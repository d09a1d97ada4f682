"""Training the text encoder: CLIP's contrastive loss, and naming what is in the picture.

The contrastive loss (Radford et al. 2021, arXiv 2103.00020, fig. 3) matches pictures with captions. Where the
pictures' content is known, the text tower also learns to name it from the caption alone (binary cross-entropy
on a multi-hot vector): a tower that can do that makes objects bind early in the U-Net's training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from ldm.checkpoint import load_tokenizer, save_text_encoder, save_tokenizer
from ldm.checkpoint.peers import text_encoder_of
from ldm.pretrain.data import Pictures
from ldm.pretrain.vocabulary import known_words
from ldm.prompts.tokenizer import CLIPTokenizer
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch, Task


def tokenise(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> Tensor:
    """Token ids int16 [N, captions, length], every picture's captions repeated to the same number."""
    most = max(len(each) for each in captions)
    flat = [each[i % len(each)] for each in captions for i in range(most)]
    ids: Tensor = tokenizer(flat, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.short().view(len(captions), most, -1)


def pick_captions(token_ids: Tensor, index: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random caption of each picture of `index` [B]: its ids [B, length], and which it is, [B]."""
    which = torch.randint(token_ids.shape[1], index.shape, generator=rng)
    return token_ids[index, which].long(), which


class CLIPTask(Task):
    """Trains transformers' CLIPModel. loss key: naming, the weight of the naming loss."""

    def __init__(
        self,
        model: dict[str, Any],
        tokenizer_dir: Path,
        train: Pictures,
        held_out: Pictures,
        loss: dict[str, float],
    ) -> None:
        super().__init__()
        self.tokenizer_dir = tokenizer_dir
        tokenizer = load_tokenizer(tokenizer_dir)
        ids = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
        ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids |= {"pad_token_id": tokenizer.pad_token_id}
        width = {"projection_dim": model["projection_dim"]}
        config = CLIPConfig(
            text_config=model["text_config"] | ids | width,
            vision_config=model["vision_config"] | {"image_size": train.images.shape[1]} | width,
            **width,
        )
        self.clip = CLIPModel(config)
        labels = 0 if train.labels is None else train.labels.shape[1]
        self.naming = nn.Linear(config.text_config.hidden_size, labels) if labels else None
        self.train_pictures, self.held_out = train, held_out
        self.token_ids = tokenise(tokenizer, train.captions)
        self.held_out_token_ids = tokenise(tokenizer, held_out.captions)
        self.naming_weight = loss_settings({"naming": 1.0}, loss)["naming"]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        embedding = self.clip.text_model.get_input_embeddings().weight
        others = [p for p in self.parameters() if p.requires_grad and p is not embedding]
        return [{"params": others, "lr": lr}, {"params": [embedding], "lr": lr, "muon": False}]

    def batch(self, rng: torch.Generator, size: int, number: int = 0) -> Batch:
        index = torch.randint(len(self.train_pictures), (size,), generator=rng)
        batch = {"x": self.train_pictures.tensors(index), "ids": pick_captions(self.token_ids, index, rng)[0]}
        if self.train_pictures.labels is not None:
            batch["labels"] = torch.from_numpy(self.train_pictures.labels[index.numpy()]).float()
        return batch

    def _embed(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image and text embeddings [B, P], and the text tower's pooled state [B, D]."""
        pooled = self.clip.text_model(input_ids=ids).pooler_output
        text = self.clip.text_projection(pooled)
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=x).pooler_output)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), pooled

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        image, text, pooled = self._embed(batch["x"], batch["ids"])
        logits = self.clip.logit_scale.clamp(max=4.6).exp() * image @ text.T
        truth = torch.arange(len(logits), device=logits.device)
        contrastive = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        loss, extra = contrastive, {"contrastive": contrastive.detach()}
        if self.naming is not None:
            named = self.naming(pooled).float()
            naming = (
                F.binary_cross_entropy_with_logits(named, batch["labels"], reduction="none").sum(1).mean()
            )
            loss = loss + self.naming_weight * naming / 10
            extra["naming"] = naming.detach()
        return loss, extra

    def evaluate(self) -> dict[str, float]:
        """How often the right picture is found for a held-out caption among 256."""
        index = torch.arange(min(256, len(self.held_out)))
        device = self.clip.logit_scale.device
        pictures, ids = self.held_out.tensors(index), self.held_out_token_ids[index, 0].long()
        image, text, _ = self._embed(pictures.to(device), ids.to(device))
        found = (text @ image.T).argmax(1) == index.to(device)
        return {"held_out_retrieval": float(found.float().mean())}

    def picture(self, folder: Path) -> Image.Image | None:
        return None

    def export(self, folder: Path) -> None:
        """text_encoder/, tokenizer/, words.txt (for a pipeline), image_encoder/ and clip/ (for metrics)."""
        save_text_encoder(text_encoder_of(self.clip.text_model), folder / "text_encoder")
        vision = CLIPVisionModelWithProjection(self.clip.config.vision_config)
        state = self.clip.state_dict()
        vision.load_state_dict({k: state[k] for k in vision.state_dict()})
        vision.half().save_pretrained(folder / "image_encoder")  # metrics need no more
        side = {"height": vision.config.image_size, "width": vision.config.image_size}
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pictures in -1..1
        processor = CLIPImageProcessorPil(size=side, do_center_crop=False, resample=2, **half)
        processor.save_pretrained(folder / "image_encoder")
        for part in (self.clip, processor):  # both towers: what `ldm evaluate --clip` reads
            part.save_pretrained(folder / "clip")
        for name in ("tokenizer", "clip"):
            save_tokenizer(load_tokenizer(self.tokenizer_dir), folder / name)
        words = known_words(caption for each in self.train_pictures.captions for caption in each)
        (folder / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
