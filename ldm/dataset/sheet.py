"""A contact sheet: what training will see of a folder of pictures, with the first words of each caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ldm.dataset.buckets import Batches, apply_crop, make_buckets
from ldm.images.pixels import to_pil

if TYPE_CHECKING:
    from ldm.dataset.findings import Example

CELL = 160  # pixels: the longer side of a crop on the sheet
LINE = 13  # pixels: the height of a line of text
GAP = 6
COLUMNS = 8
MOST = 240  # pictures on one sheet


def make_sheet(examples: Sequence[Example], resolution: int) -> Image.Image:
    """The crops at the centre, bucket by bucket; of more than 240 pictures, evenly chosen ones.

    Below each: the size that it is trained in, and the caption. Raises UserError where `resolution` makes no
    buckets, or a picture has changed since it was examined.
    """
    shown = [replace(example, repeats=1) for example in examples]
    crops = list(Batches(shown, [make_buckets(resolution)], 1, seed=0).crops())
    count = min(len(crops), MOST)
    chosen = [crops[i * len(crops) // count] for i in range(count)]
    width, height = CELL + GAP, CELL + 3 * LINE + GAP
    columns = min(COLUMNS, count)
    sheet = Image.new("RGB", (columns * width + GAP, -(-count // columns) * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for k, (example, crop) in enumerate(chosen):
        left, top = GAP + k % columns * width, GAP + k // columns * height
        picture = to_pil(apply_crop(example.open(), crop)[None] / 2 + 0.5)[0]
        picture.thumbnail((CELL, CELL))
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        size = f"{crop.size[1]} x {crop.size[0]}"
        for i, line in enumerate([size, *_lines(example.caption or "(no caption)", font)]):
            draw.text((left, top + CELL + i * LINE), line, "gray" if i == 0 else "black", font)
    return sheet


def _lines(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The first words of a caption, in two lines of a cell's width."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == 1:
            lines.append(word)
        else:
            lines[-1] += " …"
            break
    return [_fit(line, font) for line in lines]


def _fit(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while font.getlength(line) > CELL:
        line = line.rstrip("… ")[:-1] + "…"
    return line
