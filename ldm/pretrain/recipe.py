"""The recipe of a training from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from ldm.errors import UserError
from ldm.train.recipe import Finite, Fixed, OptimiserSection, RunSection, Section, read_yaml, validate


class SpriteSection(Section):
    """The world of sprites: `ldm.postcards.sprites`, which needs the repository's atlas."""

    things: int = Field(400, ge=1)  # the most usual ones
    styles: tuple[Literal["flat", "3d", "noto", "twemoji"], ...] = Field(("flat", "3d"), min_length=1)
    postcards: float = Field(0.12, ge=0, le=1)  # share of scenes that are postcards
    compositions: dict[
        Literal["one", "two", "three", "beside", "stacked"], Annotated[Finite, Field(ge=0)]
    ] = Field({})


class DataSection(Section):
    """Which pictures to train on: rendered postcards, or a folder of images with captions."""

    sprites: SpriteSection | None = None  # render sprites and postcards, not postcards only
    folder: Path | None = None  # images with captions, as `ldm folder` reads them; None renders postcards
    count: int = Field(60_000, ge=1)  # postcards to render
    captions: int = Field(4, ge=1)  # captions written for each postcard
    reworded: float = Field(0.0, ge=0, le=1)  # share of them said in other words, `ldm.postcards.reword`
    compositions: dict[str, Annotated[Finite, Field(ge=0)]] = Field({})  # weights of postcards' COMPOSITIONS
    shades: float = Field(0.0, ge=0, le=1)  # share of postcards with things in a `shade` of their colour
    size: Fixed[int] = Field(128, ge=32, multiple_of=8)  # pixels, square
    seed: Fixed[int] = 1
    held_out: int = Field(512, ge=1)  # pictures kept for the held-out loss
    cache: Path = Path("runs/data")  # where rendered pictures are kept between runs

    @field_validator("compositions")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        from ldm.postcards.scene import COMPOSITIONS

        for name in value:
            if name not in COMPOSITIONS:
                raise ValueError(f"{name} is no composition: they are {', '.join(COMPOSITIONS)}")
        if value and not any(value.values()):
            raise ValueError("give one of them a weight above 0")
        return value


class Recipe(Section):
    """A training from scratch: `data`, `model` (diffusers-style configs), `loss`, `optimiser`, `run`."""

    data: DataSection = DataSection()
    model: Fixed[dict[str, Any]] = Field({})
    loss: dict[str, float] = Field({})
    optimiser: OptimiserSection = OptimiserSection()
    run: RunSection


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides (values are YAML).

    Raises UserError naming the file and the key when something is unknown or out of range.
    """
    raw = read_yaml(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as section.key=value")
        *sections, last = key.split(".")
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = yaml.safe_load(value)
    return validate(Recipe, raw, str(path))
