"""What is measured: rows, and the models that they are measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

PROMPT = "a red sailboat on a calm sea at sunset"
NEGATIVE = "rain"  # of all pictures: without one SDXL would encode one text, with one all encode two


@dataclass(frozen=True)
class Figure:
    """A number of a measurement: its title in the table and its unit."""

    title: str
    unit: str = "s"


@dataclass(frozen=True)
class Row:
    """One thing that is measured.

    figures: by the names under which peers give them; the first is the one that is drawn. fresh: each round
    is a process of its own, from its start on. apart: in processes that do nothing else, as their memory is
    told.
    """

    name: str
    figures: dict[str, Figure]
    fresh: bool = False
    apart: bool = False


def _row(name: str, title: str) -> Row:
    return Row(name, {"s": Figure(title), "gpu_mib": Figure(f"{title}: peak of the GPU's memory", "MiB")})


PEAK = "peak of resident memory"
ROWS = {
    row.name: row
    for row in (
        _row("unet", "U-Net call with guidance (batch 2)"),
        _row("decode", "VAE decode"),
        _row("encode", "VAE encode"),
        _row("text", "text encoder, prompt and negative prompt"),
        _row("picture", "whole picture"),
        _row("batch", "whole pictures, a batch of them"),
        Row("cold", {"s": Figure("cold start to PNG"), "peak_mib": Figure(f"its {PEAK}", "MiB")}, fresh=True),
        Row(
            "load",
            {
                "s": Figure("load, after imports"),
                "imports_s": Figure("imports"),
                "cpu_s": Figure("load: processor time"),
                "anonymous_mib": Figure("load: anonymous memory then", "MiB"),
                "peak_mib": Figure(f"load: {PEAK}, beyond the imports'", "MiB"),
                "weights_mib": Figure("load: the weights themselves", "MiB"),
            },
            fresh=True,
        ),
        Row("lora", {"s": Figure("LoRA step"), "peak_mib": Figure(f"LoRA: {PEAK}", "MiB")}, apart=True),
        Row(
            "full",
            {"s": Figure("step of training all weights"), "peak_mib": Figure(f"all weights: {PEAK}", "MiB")},
            apart=True,
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """A model and the sizes at which rows are measured on it; travels to processes as JSON.

    folder: a pipeline folder that every peer reads. cache: what peers make of it (other formats, compiled
    networks) lies there. height, width: pixels. batch: pictures at once in the row "batch". training: random
    shapes of Stable Diffusion 1.5, whatever the folder holds, with so many pictures of 256 x 256 a step.
    """

    model: str
    folder: str
    cache: str
    height: int
    width: int
    steps: int
    guidance: float = 4.0
    batch: int = 8
    training: int = 4
    device: str = "cpu"
    threads: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    @property
    def made(self) -> Path:
        """Where peers keep what they make of this model."""
        return Path(self.cache) / self.model

    def files(self) -> Iterator[Path]:
        """The weights."""
        yield from Path(self.folder).rglob("*.safetensors")

    @property
    def size_mib(self) -> float:
        """Of the weights on disk."""
        return sum(file.stat().st_size for file in self.files()) / 2**20


@dataclass(frozen=True)
class Model:
    """How a model is measured: side of its pictures in pixels, steps, its rows.

    family: of `ldm/checkpoint/original/families`, whose shapes it has with random weights; "" is the
    embedded one.
    """

    side: int
    steps: int
    rows: tuple[str, ...]
    family: str = ""
    batch: int = 8


_DRAWN = ("unet", "decode", "encode", "text", "picture")
MODELS = {
    "postcard": Model(128, 8, (*_DRAWN, "batch", "cold", "load")),
    "sd15": Model(512, 20, (*_DRAWN, "cold", "load", "lora"), "sd1", batch=2),
    "sdxl": Model(1024, 20, (*_DRAWN, "cold", "load"), "sdxl", batch=1),
}
# What fits five minutes on two slow cores: model -> side, rows.
QUICK = {
    "postcard": (128, ("unet", "decode", "encode", "text", "picture", "cold")),
    "sd15": (192, ("unet", "decode")),
}
