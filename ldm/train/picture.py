"""One picture file: how it is opened for training, and what it turns out to be when it is examined."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ldm.errors import UserError
from ldm.rgb import to_rgb

SUFFIX = re.compile(r"\.(png|jpe?g|jpe|jfif|webp|bmp|gif|tiff?|avif|jp2|p[gnp]m)", re.IGNORECASE)
# Pillow reads more than these: none that starts another program, none that takes any bytes for a picture.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
THUMB = (9, 8)  # width, height: 8 differences in each of 8 rows make 64 bits

FaultKind = Literal["not an image", "truncated", "unreadable", "too large"]


@dataclass(frozen=True)
class Look:
    """A file that can be trained on."""

    digest: str  # SHA-256 of the file's bytes, hex
    size: tuple[int, int]  # (height, width) in pixels, upright
    oddities: tuple[tuple[str, str], ...]  # (kind, what `open_upright` does about it)
    thumb: NDArray[np.uint8]  # [8, 9, 3], upright


@dataclass(frozen=True)
class Fault:
    """A file that cannot."""

    kind: FaultKind
    text: str


def open_upright(path: str | Path) -> Image.Image:
    """A picture as training sees it: RGB, 8 bits, turned as its EXIF says, transparent parts on white.

    Grey, palette, CMYK and 16-bit pictures are converted; of animations and pages, the first is taken.
    Raises UserError on what cannot be read or fully decoded.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            image.load()
            turn = TURNS.get(_orientation(image))
            rgb = to_rgb(image)
    except Exception as error:  # broken files make decoders raise anything
        raise UserError(f"cannot read the picture {path}: {_reason(error)}") from None
    return rgb if turn is None else rgb.transpose(turn)


def look(path: Path) -> Look | Fault:
    """Read one file whole: first its header, then its digest, then every pixel. Never raises.

    JPEGs are decoded at a fraction of their size: all their data is read and checked, but most of the
    inverse cosine transform is left out.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                return Fault("unreadable", "the file is empty")
            file.seek(0)
            image = Image.open(file, formats=_formats())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            return _decode(image, digest)
    except UnidentifiedImageError:
        return Fault("not an image", f"its content is no picture{_what_it_is(path)}")
    except Image.DecompressionBombError:
        return Fault("too large", f"it claims more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels")
    except Exception as error:
        return _damaged(error)


def _decode(image: Image.Image, digest: str) -> Look | Fault:
    deep = image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in _tiles(image))
    whole = image.size
    image.draft(None, (128, 128))
    drafted = image.size != whole
    try:
        image.load()
    except Exception as error:
        return _damaged(error)
    width, height = whole if drafted else image.size
    orientation = _orientation(image)
    try:
        small = to_rgb(image).resize((72, 72), Image.Resampling.BOX, reducing_gap=2)
    except ValueError as error:
        return Fault("unreadable", _reason(error))
    turn = TURNS.get(orientation)
    if turn is not None:
        small = small.transpose(turn)
        width, height = (height, width) if orientation >= 5 else (width, height)
    oddities = {
        "EXIF-rotated": turn is not None and f"EXIF orientation {orientation}: turned upright",
        "alpha": _see_through(image) and "partly transparent: laid on white",
        "CMYK": image.mode == "CMYK" and "CMYK: converted to RGB",
        "16-bit": deep and "more than 8 bits a channel: rounded to 8",
        # Phones put a second, equal picture into a JPEG (MPO): no animation.
        "animated": image.format != "MPO"
        and getattr(image, "is_animated", False)
        and "several frames or pages: the first is taken",
    }
    told = tuple((kind, str(text)) for kind, text in oddities.items() if text)
    return Look(digest, (height, width), told, np.asarray(small.resize(THUMB, Image.Resampling.BOX)))


def _see_through(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest < 255)  # type: ignore[operator]  # one channel has one pair


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Call it after load(): Pillow turns TIFFs by itself."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a picture is not to be lost over its broken EXIF block
        return 1
    return value if value in TURNS else 1


def _tiles(image: Image.Image) -> list[Any]:
    return list(getattr(image, "tile", []))


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _damaged(error: Exception) -> Fault:
    """Errors of the system have a number; decoders have none of theirs."""
    if isinstance(error, OSError) and error.errno is not None:
        return Fault("unreadable", _reason(error))
    return Fault("truncated", f"cut short or damaged ({_reason(error)})")


def _what_it_is(path: Path) -> str:
    """A guess at what a file that is no picture may be: a web page is the common one."""
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return " but a web page"
    return " but a git-lfs pointer" if start.startswith(b"version https://git-lfs") else ""


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
