"""One picture file of a folder: what it turns out to be when it is examined."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ldm.errors import reason
from ldm.images.opening import TURNS, formats, orientation, to_rgb

SUFFIX = re.compile(r"\.(png|jpe?g|jpe|jfif|webp|bmp|gif|tiff?|avif|jp2|p[gnp]m)", re.IGNORECASE)
MASKS = (".mask", "-masklabel")  # ends of the names of masks beside pictures: ours, and OneTrainer's
THUMB = (9, 8)  # width, height: 8 differences in each of 8 rows make 64 bits

FaultKind = Literal["not an image", "truncated", "unreadable", "too large"]


@dataclass(frozen=True)
class PictureInfo:
    """A file that can be trained on."""

    digest: str  # SHA-256 of the file's bytes, hex
    size: tuple[int, int]  # (height, width) in pixels, upright
    oddities: tuple[tuple[str, str], ...]  # (kind, what `open_picture` does about it)
    thumb: NDArray[np.uint8]  # [8, 9, 3], upright


@dataclass(frozen=True)
class Fault:
    """A file that cannot."""

    kind: FaultKind
    text: str


def masks_beside(pictures: Iterable[Path]) -> dict[Path, Path]:
    """Of files of pictures, those that are masks of others: picture -> mask, each by its name."""
    by_stem = {path.with_suffix(""): path for path in pictures}
    found: dict[Path, Path] = {}
    for stem, path in by_stem.items():
        for ending in MASKS:
            mask = by_stem.get(stem.with_name(stem.name + ending))
            if mask is not None:
                found.setdefault(path, mask)
    return found


def inspect_picture(path: Path) -> PictureInfo | Fault:
    """Read one file whole: first its header, then its digest, then every pixel. Never raises.

    JPEGs are decoded at a fraction of their size: all their data is read and checked, but most of the
    inverse cosine transform is left out.
    """
    try:
        with path.open("rb") as file:
            return inspect_bytes(file)
    except OSError as error:
        return _damaged(error)


def inspect_bytes(file: BufferedReader | BytesIO) -> PictureInfo | Fault:
    """As `inspect_picture`, of a file that is open, or of bytes."""
    try:
        if not file.read(1):
            return Fault("unreadable", "the file is empty")
        file.seek(0)
        image = Image.open(file, formats=formats())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return _decode(image, digest)
    except UnidentifiedImageError:
        return Fault("not an image", f"its content is no picture{_what_it_is(file)}")
    except Image.DecompressionBombError:
        return Fault("too large", f"it claims more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels")
    except Exception as error:
        return _damaged(error)


def _decode(image: Image.Image, digest: str) -> PictureInfo | Fault:
    deep = image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in _tiles(image))
    whole = image.size
    image.draft(None, (128, 128))
    drafted = image.size != whole
    try:
        image.load()
    except Exception as error:
        return _damaged(error)
    width, height = whole if drafted else image.size
    turned = orientation(image)
    try:
        small = to_rgb(image).resize((72, 72), Image.Resampling.BOX, reducing_gap=2)
    except ValueError as error:
        return Fault("unreadable", reason(error))
    turn = TURNS.get(turned)
    if turn is not None:
        small = small.transpose(turn)
        width, height = (height, width) if turned >= 5 else (width, height)
    oddities = {
        "EXIF-rotated": turn is not None and f"EXIF orientation {turned}: turned upright",
        "alpha": _see_through(image) and "partly transparent: laid on white",
        "CMYK": image.mode == "CMYK" and "CMYK: converted to RGB",
        "16-bit": deep and "more than 8 bits a channel: rounded to 8",
        # Phones put a second, equal picture into a JPEG (MPO): no animation.
        "animated": image.format != "MPO"
        and getattr(image, "is_animated", False)
        and "several frames or pages: the first is taken",
    }
    found = tuple((kind, str(text)) for kind, text in oddities.items() if text)
    return PictureInfo(digest, (height, width), found, np.asarray(small.resize(THUMB, Image.Resampling.BOX)))


def _see_through(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest < 255)  # type: ignore[operator]  # one channel has one pair


def _tiles(image: Image.Image) -> list[Any]:
    return list(getattr(image, "tile", []))


def _damaged(error: Exception) -> Fault:
    """Errors of the system have a number; decoders have none of theirs."""
    if isinstance(error, OSError) and error.errno is not None:
        return Fault("unreadable", reason(error))
    return Fault("truncated", f"cut short or damaged ({reason(error)})")


def _what_it_is(file: BufferedReader | BytesIO) -> str:
    """A guess at what a file that is no picture may be: a web page is the common one."""
    file.seek(0)
    start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return " but a web page"
    return " but a git-lfs pointer" if start.startswith(b"version https://git-lfs") else ""
