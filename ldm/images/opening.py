"""The one way in for pictures: safe formats only, upright, RGB of 8 bits.

No torch here: folders are examined without it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm.errors import UserError
from ldm.files import reason

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


def open_picture(path: str | Path, file: IO[bytes] | None = None) -> Image.Image:
    """A picture as RGB of 8 bits, turned as its EXIF says, transparent parts on white.

    Grey, palette, CMYK and 16-bit pictures are converted; of animations and pages, the first is taken.

    Args:
        path: where it lies, or the name for messages if `file` holds its bytes.

    Raises:
        UserError: on what cannot be read or fully decoded.
    """
    try:
        with Image.open(path if file is None else file, formats=formats()) as image:
            image.load()
            turn = TURNS.get(orientation(image))
            rgb = to_rgb(image)
    except UnidentifiedImageError:
        raise UserError(f"cannot read the picture {path}: it is not a picture, or a damaged one") from None
    except Exception as error:  # broken files make decoders raise anything
        raise UserError(f"cannot read the picture {path}: {reason(error)}") from None
    return rgb if turn is None else rgb.transpose(turn)


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
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
