"""Pictures that requests draw from: uploaded, checked before they are decoded, kept under their digests."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ldm.errors import UserError
from ldm.files import whole_file
from ldm.images.opening import open_picture, to_mask

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
KEPT = 2**30  # bytes of uploads; the oldest go
DATA = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)


class Uploads:
    """A folder of uploads: `put` gives an id, `place` where it lies."""

    def __init__(self, folder: Path, pixels: int, side: int, kept: int = KEPT) -> None:
        self.folder, self.pixels, self.side, self.kept = folder, pixels, 8 * side, kept

    def put(self, data: bytes, what: str = "image") -> str:
        """Keep a picture; `what` is the field that messages name. Raises UserError.

        Its head is read first: format and size are known before a pixel is decoded.
        """
        suffix = self._check(data, what)
        name = f"{hashlib.sha256(data).hexdigest()}.{suffix}"
        path = self.folder / name
        if path.is_file():
            os.utime(path)
            return name
        open_picture(what, io.BytesIO(data), to_mask if what == "mask_image" else None)
        self._make_room(len(data))
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
        return name

    def place(self, name: str) -> Path | None:
        """Where an upload lies; None for what is none."""
        if not re.fullmatch(r"[0-9a-f]{64}\.(png|jpg|webp)", name):
            return None
        path = self.folder / name
        return path if path.is_file() and not path.is_symlink() else None

    def _check(self, data: bytes, what: str) -> str:
        """The suffix of a picture that may be decoded. Raises UserError."""
        try:
            with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
                (width, height), kind = image.size, str(image.format)
                frames = getattr(image, "n_frames", 1)
        except UnidentifiedImageError:
            raise UserError(f"{what} is not allowed: it must be a PNG, JPEG or WebP picture") from None
        except Exception as error:  # broken files, and bombs, make decoders raise anything
            raise UserError(f"{what} cannot be read as a picture: {type(error).__name__}") from None
        if width * height > self.pixels or max(width, height) > self.side:
            raise UserError(
                f"{what} is not allowed: it has {width} x {height} pixels, and this server takes at most "
                f"{self.pixels}, {self.side} a side"
            )
        if frames > 1:
            raise UserError(f"{what} is not allowed: it is an animation of {frames} pictures")
        return FORMATS[kind]

    def _make_room(self, size: int) -> None:
        """Remove the uploads that were not used for longest, so that `size` bytes more may be kept."""
        paths = [path for path in self.folder.glob("*.*") if path.suffix[1:] in FORMATS.values()]
        states = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in paths)
        used = size + sum(each for _, each, _ in states)
        for _, each, path in states:
            if used <= self.kept:
                return
            path.unlink(missing_ok=True)
            used -= each


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of base64, with or without a `data:` prefix of a picture. Raises UserError."""
    match = DATA.match(text)
    try:
        return base64.b64decode(text[match.end() if match else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{what} is not allowed: it must be base64 of a PNG, JPEG or WebP picture") from None


def is_data(text: str) -> bool:
    return DATA.match(text) is not None
