"""CLIP's image tower, for distances between sets of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

IMAGE_ENCODER = "image_encoder"  # a folder beside the scorer, in transformers' layout


class ImageTower:
    """transformers' CLIPVisionModelWithProjection as scripts/train_clip.py writes it."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @classmethod
    def find(cls, folder: Path) -> ImageTower | None:
        """The tower in folder/image_encoder, fp32; None where there is none."""
        if not (folder / IMAGE_ENCODER / "config.json").exists():
            return None
        from transformers import CLIPVisionModelWithProjection

        return cls(CLIPVisionModelWithProjection.from_pretrained(folder / IMAGE_ENCODER, dtype=torch.float32))

    @torch.inference_mode()
    def embed(self, images: NDArray[np.uint8], batch_size: int = 64) -> NDArray[np.float64]:
        """uint8 [N, H, W, 3] -> embeddings of length 1, [N, P]."""
        size = self.model.config.image_size
        parts = []
        for i in range(0, len(images), batch_size):
            x = torch.from_numpy(images[i : i + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1
            if x.shape[-2:] != (size, size):
                x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            parts.append(F.normalize(self.model(pixel_values=x).image_embeds, dim=-1))
        return torch.cat(parts).double().numpy()
