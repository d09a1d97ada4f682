"""Recipes: what a training run is, read from YAML and validated in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ldm.errors import UserError


class Section(BaseModel):
    """A frozen part of a recipe; an unknown key is an error, not a typo that trains for hours."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSection(Section):
    """Which pictures to train on: rendered postcards, or a folder of images with captions."""

    folder: Path | None = None  # images with .txt beside them or a metadata.jsonl; None renders postcards
    count: int = Field(60_000, ge=1)  # postcards to render
    captions: int = Field(4, ge=1)  # captions written for each postcard
    size: int = Field(128, ge=32, multiple_of=8)  # pixels, square
    seed: int = 1
    held_out: int = Field(512, ge=1)  # pictures kept for the held-out loss
    cache: Path = Path("runs/data")  # where rendered pictures are kept between runs


class OptimiserSection(Section):
    """AdamW, linear warm-up, flat, then a cosine to 2 % over the last part of the run."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(200, ge=0)
    decay_from: float = Field(0.6, ge=0, lt=1)  # fraction of the run
    ema_decay: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1)  # of each process, and of each of the accumulation's parts
    gradient_accumulation_steps: int = Field(1, ge=1)


class RunSection(Section):
    """How long, on what, and how often to look."""

    seed: int = 0
    max_steps: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, gt=0)  # of training, over all resumed parts of the run
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    log_every: int = Field(50, ge=1)
    eval_every: int = Field(500, ge=1)
    save_every: int = Field(1000, ge=1)
    checkpoints_total_limit: int = Field(1, ge=1)  # states kept
    # latest, the newest whole state in the run's folder; no; or a state's path, or its name in that folder
    resume_from_checkpoint: str = "latest"
    force: bool = False  # go on where a changed recipe, damage or states left behind speak against it
    on_nan: Literal["stop", "skip"] = "stop"  # for a batch whose loss is NaN or Inf
    report_to: Literal["none", "tensorboard"] = "none"  # beside metrics.jsonl, which is always written

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        """YAML reads a bare `no` as false."""
        return "no" if value is False else value

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("set max_steps or max_minutes, or the run never ends")
        return self


class Recipe(Section):
    """One training run: `data`, `model` (diffusers-style configs), `loss`, `optimiser`, `run`."""

    data: DataSection = DataSection()
    model: dict[str, Any] = {}
    loss: dict[str, float] = {}
    optimiser: OptimiserSection = OptimiserSection()
    run: RunSection


def loss_settings(defaults: dict[str, float], given: dict[str, float]) -> dict[str, float]:
    """A task's `loss` section over its defaults. Raises UserError naming a key it does not have."""
    for key in given:
        if key not in defaults:
            raise UserError(f"loss.{key} is unknown: this trainer has {', '.join(defaults)}")
    return defaults | given


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides (values are YAML).

    Raises UserError naming the file and the key when something is unknown or out of range.
    """
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}".replace("\n", " ")) from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as section.key=value")
        *sections, last = key.split(".")
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = yaml.safe_load(value)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']} (got {first['input']!r})") from error
