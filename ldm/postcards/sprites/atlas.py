"""The things that sprites show, and their pixels, read from `assets/sprites` of the repository.

The atlas is only for training, so it lies outside the package and no wheel has it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.errors import UserError
from ldm.postcards.sprites.colour import recolour

CELL = 144  # pixels of a sprite's longer side
INDEX = "index.json"
STYLES = ("flat", "3d", "noto", "twemoji")
FOLDER = Path(__file__).resolve().parents[3] / "assets" / "sprites"


@dataclass(frozen=True)
class Sprite:
    """One drawing: its size in pixels, the mean colour and the dominant hue (0 to 1) of what is drawn, and
    whether that hue can be another.
    """

    width: int
    height: int
    mean: tuple[int, int, int]
    hue: float
    paintable: bool

    @property
    def aspect(self) -> float:
        """Width in units of the height."""
        return self.width / self.height


@dataclass(frozen=True)
class Thing:
    """What can be in a picture.

    realm: "ground", "air" or "water"; "table" and "food" for what is small and seldom lies in the open;
    "portrait" for heads and busts, which are cut off by the lower edge of the picture; "icon" for what is on
    plain backgrounds only. plural is None where there is none to speak of (scissors); then the article may be
    empty or "a pair of". big: larger than others beside it.
    """

    number: int
    code: str
    noun: str
    plural: str | None
    article: str
    realm: str
    big: bool
    also: tuple[str, ...]
    sprites: Mapping[str, Sprite] = field(compare=False)


@functools.cache
def load_things(folder: Path = FOLDER) -> tuple[Thing, ...]:
    """All things of the atlas, the most usual first. Raises UserError where it is not there."""
    try:
        rows = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"no sprites in {folder}: they are in the repository, not in the package; work in a clone of it"
        ) from error
    return tuple(
        Thing(
            number,
            row["code"],
            row["noun"],
            row["plural"],
            row["article"],
            row["realm"],
            row["size"] == "big",
            tuple(row["also"]),
            {style: Sprite(**row[style] | {"mean": tuple(row[style]["mean"])}) for style in STYLES},
        )
        for number, row in enumerate(rows)
    )


@functools.cache
def _sheet(style: str, folder: Path) -> NDArray[np.uint8]:
    with Image.open(folder / f"{style}.webp") as opened:
        return np.asarray(opened.convert("RGBA"))


def pixels(thing: Thing, style: str, colour: str | None = None, folder: Path = FOLDER) -> NDArray[np.uint8]:
    """A sprite [height, width, 4], not premultiplied; in another colour where one is given."""
    whole, sprite = _sheet(style, folder), thing.sprites[style]
    row, column = divmod(thing.number, whole.shape[1] // CELL)
    top, left = row * CELL, column * CELL
    cut = whole[top : top + sprite.height, left : left + sprite.width]
    return cut if colour is None else recolour(cut, sprite.hue, colour)
