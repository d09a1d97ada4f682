"""Areas of a picture that have prompts of their own, as a request says them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ldm.errors import UserError, printable
from ldm.request.fields import Checked, Digest, Fraction, Text

FORM = 'write "x,y,width,height: text" (pixels, or shares of the picture), or "mask.png: text"'
_BOX = re.compile(r"\s*((?:[\d.]+\s*,\s*){3}[\d.]+)\s*((?:,\s*\w+\s*=\s*[\d.]+\s*)*):(.*)", re.DOTALL)
_MASK = re.compile(r"\s*(.*?)\s*((?:,\s*(?:weight|strength)\s*=\s*[\d.]+\s*)*):\s(.*)", re.DOTALL)


def _has_area(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if not (box[2] > 0 and box[3] > 0):
        raise ValueError("no area")
    return box


Edge = Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)]
Box = Annotated[
    tuple[Edge, Edge, Edge, Edge],
    AfterValidator(_has_area),
    Field(description="x, y, width and height: pixels, or shares of the picture where none is above 1"),
]
Weight = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False, description="a number above 0")]


class Region(Checked):
    """What an area of a picture shows: a box, or what is white in a mask's file."""

    prompt: Text
    box: Box | None = None
    mask: Text | None = None  # path
    mask_sha256: Digest | None = None
    weight: Weight = 1.0  # beside those of other regions, where they overlap
    strength: Fraction = 1.0  # how far it follows its own prompt, and not the picture's

    @model_validator(mode="after")
    def _is_one_area(self) -> Self:
        if (self.box is None) == (self.mask is None):
            raise UserError("a region is a box or a mask: give it one of them")
        return self

    def share(self, size: tuple[int, int]) -> Region:
        """With its box in shares of a picture of (height, width) pixels. Raises UserError beyond its edges.

        So it fits the same picture at another size.
        """
        if self.box is None:
            return self
        x, y, width, height = self.box
        if max(self.box) > 1:
            x, y, width, height = x / size[1], y / size[0], width / size[1], height / size[0]
        if x + width > 1.0001 or y + height > 1.0001:
            raise UserError(
                f"the region {','.join(f'{each:g}' for each in self.box)} goes beyond the picture of "
                f"{size[1]}x{size[0]} pixels: x + width and y + height end there"
            )
        return self.replace(box=(x, y, width, height))


def read_region(text: str) -> dict[str, Any]:
    """The fields of a region written in one line, `FORM`; weight=2 and strength=0.5 may follow the area.

    Raises UserError.
    """
    if (found := _BOX.fullmatch(text)) is not None:
        area: dict[str, Any] = {"box": tuple(found[1].split(","))}
    elif (found := _MASK.fullmatch(text)) is not None and found[1].strip("0123456789., "):
        area = {"mask": found[1]}
    else:
        raise UserError(f"the region {printable(text)!r:.80} is not understood: {FORM}")
    options = dict(each.split("=") for each in re.sub(r"\s", "", found[2]).split(",")[1:])
    return {**area, **options, "prompt": found[3].strip()}


def _read(given: Any) -> Any:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list | tuple):
        return given
    return tuple(read_region(each) if isinstance(each, str) else each for each in given) or None


Factors = Annotated[
    tuple[Weight, Weight, Weight, Weight],
    Field(description="four numbers above 0: b1, b2, s1, s2"),
]
Regions = Annotated[
    Annotated[tuple[Region, ...], Field(max_length=64, description="a list of at most 64 regions")] | None,
    BeforeValidator(_read),
]
