"""Sheets with words on them: captions under pictures, and tables with headings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ldm.images.pixels import GRID_GAP

MAX_PIXELS = 2**26  # of a sheet: 8192 x 8192; a Pillow that opens larger ones warns
MAX_SIDE = 16_383  # what a WebP holds
MAX_LINES = 3  # of a label
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def label(text: str, width: int, size: int, margin: int = 4) -> Image.Image:
    """`text` in black on white, centred in lines of `width` pixels; what is too long ends in an ellipsis."""
    font = ImageFont.load_default(size)
    lines = _wrapped(" ".join(text.split()), width - 2 * margin, font)
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), "\n".join(lines), font)
    image = Image.new("RGB", (width, int(box[3]) + 2 * margin), "white")
    place = (width / 2, margin)
    ImageDraw.Draw(image).multiline_text(place, "\n".join(lines), "black", font, anchor="ma", align="center")
    return image


def font_size(width: int) -> int:
    """Of labels over pictures that wide, in pixels."""
    return max(10, min(32, width // 14))


def captioned(image: Image.Image, text: str) -> Image.Image:
    """A picture with its caption below."""
    return table([[image], [label(text, image.width, font_size(image.width))]], gap=0)


def table(rows: Sequence[Sequence[Image.Image | None]], gap: int = GRID_GAP) -> Image.Image:
    """Images in rows and columns on white, each in the middle of its place; None leaves one empty."""
    columns = range(max(map(len, rows)))
    sizes = [[(0, 0) if each is None else each.size for each in row] for row in rows]
    widths = [max((row[c][0] for row in sizes if c < len(row)), default=0) for c in columns]
    heights = [max((height for _, height in row), default=0) for row in sizes]
    whole = (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1))
    sheet, top = Image.new("RGB", whole, "white"), 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for image, width in zip(row, widths, strict=False):
            if image is not None:
                sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
            left += width + gap
        top += height + gap
    return sheet


def shrinking(size: tuple[int, int], columns: int, rows: int) -> float:
    """By how much pictures of that size are made smaller, at most 1, so that a sheet of so many can be."""
    width = (size[0] + GRID_GAP) * (columns + 1)  # with labels
    height = round(1.1 * (size[1] + GRID_GAP)) * (rows + 1)
    return min(1.0, MAX_SIDE / width, MAX_SIDE / height, math.sqrt(MAX_PIXELS / (width * height)))


def shrunk(image: Image.Image, factor: float) -> Image.Image:
    if factor >= 1:
        return image
    size = tuple(max(1, int(side * factor)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Lines that fit; broken between words, or within one that is longer than a line."""
    lines, rest = list[str](), text
    while rest and len(lines) < MAX_LINES:
        fits = _fitting(rest, width, font)
        space = rest.rfind(" ", 1, fits + 1)
        end = fits if fits == len(rest) or space < 1 else space
        lines.append(rest[:end].strip())
        rest = rest[end:].strip()
    if rest:
        last = lines[-1]
        lines[-1] = (
            last[: max(0, _fitting(f"{last}\u2026", width, font) - 1)] + "\u2026" if last else "\u2026"
        )
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            lines[-1] = f"{lines[-1][:-2]}\u2026"
    return lines or [""]


def _fitting(text: str, width: int, font: Font) -> int:
    """How many of the first characters fit, at least 1: by halves."""
    low, high = 1, min(len(text), 4 * width)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
