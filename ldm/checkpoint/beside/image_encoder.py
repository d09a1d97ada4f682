"""CLIP's image tower from a folder of transformers, which is imported only where one is used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.beside.clip_processor import clip_processor
from ldm.checkpoint.io import read_config, weight_files
from ldm.checkpoint.parts import TEXT_STEM
from ldm.checkpoint.weights import choose_weights
from ldm.errors import UserError, reason
from ldm.files import sha256

VISION = "clip_vision_model"
# config.json's model_type -> transformers' class
CLASSES = {"clip": "CLIPModel", VISION: "CLIPVisionModelWithProjection"}


def clip_kind(folder: Path) -> str:
    """The model_type of the CLIP in a folder, one of `CLASSES`. Raises UserError for what is none."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no CLIP folder: it has no config.json; give one in transformers' layout"
        )
    kind = read_config(folder / "config.json").get("model_type")
    if kind not in CLASSES:
        raise UserError(
            f"{folder} is no CLIP: its config.json has model_type {kind!r}, not {' or '.join(CLASSES)}"
        )
    return str(kind)


def read_clip(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a folder. Raises UserError where it cannot be read, or lacks a tensor."""
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # safetensors, pickle and transformers have their own
        raise UserError(f"cannot read the CLIP in {folder}: {reason(error)}") from None
    finally:
        if shown:
            logging.enable_progress_bar()
    if absent := sorted(info["missing_keys"]):
        raise UserError(f"the CLIP in {folder} lacks {absent[0]} and {len(absent) - 1} more tensors")
    return model


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """A CLIPVisionModelWithProjection on the disk: what is known of it before its weights are read."""

    folder: Path
    width: int  # of its states
    projected: int  # of a picture's embedding
    side: int  # pixels that it sees
    sha256: str  # of its weights

    @classmethod
    def find(cls, folder: Path) -> ImageEncoder:
        """The one in a folder. Raises UserError where there is none, or a CLIP with a text tower."""
        if clip_kind(folder) != VISION:
            raise UserError(
                f"{folder} holds a CLIP with a text encoder: give that of a CLIPVisionModelWithProjection"
            )
        config = read_config(folder / "config.json")
        sizes = [config.get(name) for name in ("hidden_size", "projection_dim", "image_size")]
        defaults = (768, 512, 224)  # transformers'
        width, projected, side = (
            own if isinstance(own, int) and own > 0 else default
            for own, default in zip(sizes, defaults, strict=True)
        )
        weights = folder / choose_weights([each.name for each in folder.iterdir()], folder, TEXT_STEM)
        return cls(folder, width, projected, side, sha256(*weight_files(weights)))

    def network(self, device: torch.device, dtype: torch.dtype, keep: bool = True) -> Any:
        """transformers' model; with `keep` the last one that was asked for is held. Raises UserError."""
        read = _last if keep else _last.__wrapped__
        return read(self.folder, self.sha256, device, dtype)

    def prepared(self, images: list[Any]) -> Tensor:
        """Pictures of Pillow -> [n, 3, side, side] as the network takes them."""
        processor = clip_processor([self.folder], self.side)
        return torch.as_tensor(processor(images=images, return_tensors="pt")["pixel_values"]).float()


@lru_cache(maxsize=1)
def _last(folder: Path, digest: str, device: torch.device, dtype: torch.dtype) -> Any:
    return read_clip(folder, VISION, dtype).to(device).requires_grad_(False).eval()
