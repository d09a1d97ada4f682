"""What a model is: its parts, the schedule it was trained with, where it runs, and what adapts it."""

from __future__ import annotations

import hashlib
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from ldm.adapters import Adapted
from ldm.checkpoint import Parts, load_parts
from ldm.checkpoint.beside.classifier import ClassifierFile
from ldm.checkpoint.beside.safety import SafetyChecker
from ldm.checkpoint.io import weight_files
from ldm.checkpoint.parts import TEXT_ENCODERS
from ldm.checkpoint.save import pipeline_class
from ldm.control import Shelf
from ldm.diffusion.schedule import Schedule
from ldm.files import sha256
from ldm.memory.residence import asleep
from ldm.models import VAE, UNet
from ldm.models.kind import Kind
from ldm.prompts.text_encoder import Clip, TextEncoder
from ldm.prompts.world import World
from ldm.runtime import Runtime


@dataclass(frozen=True, eq=False)
class Loaded:
    """All that a drawing asks of a model."""

    parts: Parts
    schedule: Schedule
    runtime: Runtime
    name: str
    adapted: Adapted = field(default_factory=Adapted)  # LoRAs and textual inversions in `parts`
    lora_dir: Path = Path("loras")  # where prompts' <lora:name:weight> are found
    upscaler: Self | None = None  # what enlarges each finished picture
    refiner: Self | None = None  # what draws the last steps of each picture
    classifier: ClassifierFile | None = None  # for requests that name a class
    safety_checker: SafetyChecker | None = None  # looks at each finished picture
    max_memory: int | None = None  # bytes that a drawing may take (`ldm.pipeline.deciding.plan`)
    controlnets: tuple[str, ...] = ()  # that calls with a control_image mean
    shelf: Shelf = field(default_factory=Shelf, repr=False)  # networks of the last controls
    sleeps: bool = False  # weights come when they are used (`ldm.memory.residence`)

    @classmethod
    def from_parts(cls, parts: Parts, runtime: Runtime | None = None, name: str = "model") -> Self:
        """Of modules that are already where `runtime` says (by default: where the U-Net is)."""
        if runtime is None:
            weight = next(parts.unet.parameters())
            runtime = Runtime(weight.device, weight.dtype)
        return cls(parts, schedule_of(parts), runtime, name)

    @classmethod
    def read(cls, path: str | Path, runtime: Runtime, max_memory: int | None = None, **places: Any) -> Self:
        """Of a folder, a file or a hub name; `places` as `load_parts` takes them. Raises UserError.

        With `max_memory` no weights are read: they are when they are used.
        """
        place = Path(path).resolve()
        with nullcontext() if max_memory is None else asleep(runtime.device):
            parts = load_parts(path, runtime, **places)
        model = cls.from_parts(parts, runtime, place.stem if place.is_file() else place.name)
        return replace(model, max_memory=max_memory, sleeps=max_memory is not None)

    @property
    def unet(self) -> UNet:
        return self.parts.unet

    @property
    def vae(self) -> VAE:
        return self.parts.vae

    @property
    def tokenizer(self) -> Any:
        return self.parts.tokenizer

    @property
    def tokenizer_2(self) -> Any:
        return self.parts.tokenizer_2

    @property
    def text_encoder(self) -> Any:
        return self.parts.text_encoder

    @property
    def text_encoder_2(self) -> Any:
        return self.parts.text_encoder_2

    @property
    def kind(self) -> Kind:
        """What it draws from."""
        return self.parts.kind

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.runtime.device

    @property
    def dtype(self) -> torch.dtype:
        """What they run in."""
        return self.runtime.dtype

    @property
    def text(self) -> TextEncoder:
        parts = self.parts
        pairs = ((parts.tokenizer, parts.text_encoder), (parts.tokenizer_2, parts.text_encoder_2))
        return TextEncoder(tuple(Clip(*pair) for pair in pairs if pair[1] is not None))

    @cached_property
    def model_hash(self) -> str | None:
        """The first 10 hex digits of the SHA-256 of the U-Net's file; None for parts made in memory.

        Where something was taken from elsewhere (`Parts.changes`), of the digests of all these files.
        """
        if self.parts.weights is None:
            return None
        digest, changes = sha256(*weight_files(self.parts.weights)), self.parts.changes
        if changes:
            lines = [f"{what} {sha256(*weight_files(file))}" if file else what for what, file in changes]
            digest = hashlib.sha256("\n".join([digest, *lines]).encode()).hexdigest()
        return digest[:10]

    @property
    def bytes_per_pixel(self) -> int:
        """Of the VAE's widest features at full size: memory says how many are drawn at once."""
        return self.vae.full_size_channels * next(self.vae.parameters()).element_size()

    @property
    def world(self) -> World | None:
        """What it can draw; None if not known, and where weights from elsewhere may know more."""
        changed = {name for name, _ in self.parts.changes}
        return None if self.adapted.loras or changed & {"unet", *TEXT_ENCODERS} else self.parts.world

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the model has never seen; none where the model does not list its words."""
        if self.adapted.loras:  # which may have taught it any
            return []
        for embedding in self.adapted.embeddings:
            prompt = prompt.replace(embedding.name, " ")
        return self.parts.unknown_words(prompt)


def schedule_of(parts: Parts) -> Schedule:
    """The schedule of a model's parts.

    As diffusers' pipelines for Stable Diffusion 1 and 2 do, it takes `clip_sample` there for a mistake.
    """
    schedule = Schedule.from_config(dict(parts.scheduler))
    bounds, is_xl = schedule.bounds, "time_ids" in parts.unet.config.conditioning
    if bounds is not None and bounds.clip_sample and pipeline_class(parts) == "StableDiffusionPipeline":
        warnings.warn(
            "scheduler_config.json: clip_sample=True is for pixels, and ignored as in diffusers: say False",
            stacklevel=2,
        )
        bounds = replace(bounds, clip_sample=False)
    return replace(schedule, bounds=bounds, is_xl=is_xl)
