"""CLIP's towers: features of pictures for distances between sets, and of texts for scores of pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.checkpoint.beside.clip_processor import clip_processor, has_processor
from ldm.checkpoint.beside.image_encoder import clip_kind, read_clip
from ldm.errors import UserError, reason
from ldm.files import sha256, weights_folder

IMAGE_ENCODER = "image_encoder"  # a folder beside the scorer, in transformers' layout
EVALUATION = "postcard-eval"  # the folder of the embedded ones
BATCH = 32  # always: another one would change the last digits
PROCESSING = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std")
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

Features = NDArray[np.float64]
Pictures = NDArray[np.uint8] | Sequence[Image.Image]  # uint8 is [N, H, W, 3]
OnProgress = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True, eq=False)
class ImageTower:
    """A CLIP with its image tower, what prepares pictures for it, and its text tower where it has one.

    model: CLIPModel or CLIPVisionModelWithProjection. processor: transformers' CLIPImageProcessorPil.
    tokenizer: None without a text tower. source, digest: its folder, and the SHA-256 of its weights.
    """

    model: Any
    processor: Any
    tokenizer: Any = None
    source: str = ""
    digest: str = ""

    @classmethod
    def find(cls, folder: Path) -> ImageTower | None:
        """The tower in folder/image_encoder, fp32; None where there is none."""
        if not (folder / IMAGE_ENCODER / "config.json").exists():
            return None
        return cls.load(folder / IMAGE_ENCODER)

    @classmethod
    def embedded(cls) -> ImageTower | None:
        """The one that comes with ldm, which knows postcards only; None where it is not installed."""
        return cls.find(weights_folder(EVALUATION))

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ImageTower:
        """A folder of transformers with CLIP's config, weights and, if it is there, preprocessing; fp32.

        Raises UserError where there is none, and where a tensor is missing.
        """
        kind = clip_kind(folder)
        model = read_clip(folder, kind).eval().to(device)
        weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
        tokenizer = _tokenizer(folder) if kind == "clip" else None
        return cls(model, _processor(folder, model), tokenizer, str(folder), sha256(*weights))

    @property
    def text(self) -> bool:
        """Whether captions can be compared with pictures."""
        return self.tokenizer is not None

    def protocol(self) -> dict[str, object]:
        """What decides the features, beside the pictures."""
        values = self.processor.to_dict()
        processing = {name: values[name] for name in PROCESSING if values.get(name) is not None}
        processing["resample"] = RESAMPLING[int(values["resample"])]
        if not values["do_center_crop"]:
            del processing["crop_size"]
        facts = {"extractor": self.source, "sha256": self.digest, "dims": self.model.config.projection_dim}
        return facts | {"dtype": "fp32", "antialias": True, "preprocessing": processing}

    @torch.inference_mode()
    def features(
        self, pictures: Pictures, batch_size: int = BATCH, on_progress: OnProgress = lambda done, total: None
    ) -> Features:
        """Projected image embeddings as they are, [N, P].

        Raises UserError if one is NaN or infinite.
        """
        parts = []
        for start in range(0, len(pictures), batch_size):
            images = [_pil(image) for image in pictures[start : start + batch_size]]
            x = torch.as_tensor(np.stack(self.processor(images=images)["pixel_values"]))
            parts.append(self._image(x.float().to(self.model.device)))
            on_progress(start + len(images), len(pictures))
        return _checked(parts, self.source)

    def embed(self, pictures: Pictures, batch_size: int = BATCH) -> Features:
        """Embeddings of length 1, [N, P]."""
        return unit(self.features(pictures, batch_size))

    @torch.inference_mode()
    def texts(self, captions: Sequence[str], batch_size: int = BATCH) -> Features:
        """Projected text embeddings as they are, [N, P]; what lies beyond the window is cut off."""
        how = {"padding": "max_length", "max_length": self._window, "truncation": True}
        parts = []
        for start in range(0, len(captions), batch_size):
            part = list(captions[start : start + batch_size])
            tokens = self.tokenizer(part, **how, return_tensors="pt").to(self.model.device)
            pooled = self.model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
            parts.append(self.model.text_projection(pooled))
        return _checked(parts, self.source)

    def cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than the window."""
        return sum(len(ids) > self._window for ids in self.tokenizer(list(captions), verbose=False).input_ids)

    @property
    def _window(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def _image(self, x: Tensor) -> Tensor:
        if hasattr(self.model, "text_model"):
            pooled = self.model.vision_model(pixel_values=x).pooler_output
            projected: Tensor = self.model.visual_projection(pooled)
            return projected
        embeds: Tensor = self.model(pixel_values=x).image_embeds
        return embeds


def unit(features: Features) -> Features:
    """Each of length 1."""
    return F.normalize(torch.from_numpy(features), dim=-1).numpy()


def _pil(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def _checked(parts: Sequence[Tensor], source: str) -> Features:
    features = torch.cat([part.double().cpu() for part in parts]).numpy()
    if not np.isfinite(features).all():
        broken = int((~np.isfinite(features).all(axis=1)).sum())
        raise UserError(f"{source} gives NaN or Inf for {broken} of {len(features)}: its weights are damaged")
    return features


# --- reading ---------------------------------------------------------------------------------------------


def _processor(folder: Path, model: Any) -> Any:
    """By the folder's own preprocessor_config.json, else CLIP's at the size of the model."""
    side = getattr(model.config, "vision_config", model.config).image_size
    if not has_processor(folder):
        warnings.warn(
            f"{folder} has no preprocessor_config.json: CLIP's own at {side} pixels is used", stacklevel=2
        )
    return clip_processor([folder], side)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"cannot read the tokenizer of the CLIP in {folder}: {reason(error)}") from None
