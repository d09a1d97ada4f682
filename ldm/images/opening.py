"""The one way in for pictures: ordinary files of safe formats, upright, RGB of 8 bits; and for masks.

No torch here: folders are examined without it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm.errors import UserError, printable, reason

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
MAX_BYTES = 2**28  # of a file; Pillow has a limit of its own for pixels


def read_bytes(path: str | Path) -> bytes:
    """A picture's file, whole. Its name may come from a stranger: no device, no pipe, nothing without end.

    Raises UserError.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # even to open some would wait, or do something
            raise OSError("it is not an ordinary file")
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the picture {printable(path)}: {reason(error)}") from None
    if len(data) > MAX_BYTES:
        most = f"{MAX_BYTES // 2**20} MiB"
        raise UserError(
            f"cannot read the picture {printable(path)}: it has more than {most}; save it smaller"
        )
    return data


def open_picture(
    path: str | Path,
    file: IO[bytes] | None = None,
    convert: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """A picture as RGB of 8 bits, turned as its EXIF says, transparent parts on white.

    Grey, palette, CMYK and 16-bit pictures are converted; of animations and pages, the first is taken.

    Args:
        path: where it lies, or the name for messages if `file` holds its bytes.
        convert: `to_mask` for a mask; by default `to_rgb`.

    Raises:
        UserError: on what cannot be read or fully decoded.
    """
    try:
        with Image.open(path if file is None else file, formats=formats()) as image:
            image.load()
            turn = TURNS.get(orientation(image))
            converted = (convert or to_rgb)(image)
    except UnidentifiedImageError:
        raise UserError(
            f"cannot read the picture {printable(path)}: it is not a picture, or a damaged one"
        ) from None
    except Exception as error:  # broken files make decoders raise anything
        raise UserError(f"cannot read the picture {printable(path)}: {reason(error)}") from None
    return converted if turn is None else converted.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Call it after load(): Pillow turns TIFFs by itself."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a picture is not to be lost over its broken EXIF block
        return 1
    return value if value in TURNS else 1


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and 16-bit pictures converted, transparent parts on white.

    Raises ValueError for pixels of 32 bits, which have no agreed white.
    """
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535 or image.mode == "F":
            raise ValueError("it has 32 bits a channel, with no agreed white: save it with 8 or 16")
        # Pillow's own conversion cuts everything above 255 off.
        return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = to_rgba(image)
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """A mask of 8 bits, grey: white where a picture is drawn anew.

    Alpha says what is painted: of a mask with transparent parts it is the alpha, whatever the colours. One
    that is opaque everywhere is read by its luminance. Raises ValueError as `to_rgb` does.
    """
    if image.has_transparency_data:
        alpha = _alpha(image)
        if alpha.getextrema() != (255, 255):
            return alpha
    return to_rgb(image).convert("L")


def to_alpha(image: Image.Image) -> Image.Image:
    """How opaque each pixel is, grey of 8 bits: white all over where a picture has no alpha."""
    return _alpha(image) if image.has_transparency_data else Image.new("L", image.size, "white")


def _alpha(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # of 16 bits, with one level that is transparent
        painted = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(painted.astype(np.uint8) * 255)
    return to_rgba(image).getchannel("A")


def to_rgba(image: Image.Image) -> Image.Image:
    """With how opaque each pixel is, colours not premultiplied."""
    # Pillow has no way from premultiplied grey to RGBA in one.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
