"""Pictures on disk: in other formats, and what they say of themselves and of their origin."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.files import whole_file
from ldm.images.formats import Encoding, encode
from ldm.images.opening import open_picture, to_rgb
from ldm.images.png import read_request, request_of
from ldm.images.provenance import Marks
from ldm.images.texts import read_texts
from ldm.request import Request

SIDE, QUALITY = 256, 80  # of a thumbnail: pixels of its longest side
KEPT = 2**28  # bytes of thumbnails
SWEEP = 256  # thumbnails between looks at how much room they take


class Thumbnails:
    """Small WebPs of a gallery's pictures, each made when it is first asked for, in a folder of their own.

    They are never the truth: one of another time than its picture is made again, those of the oldest pictures
    go beyond `kept` bytes, and the folder may be deleted. Threads may share it.
    """

    def __init__(self, folder: Path, marks: Marks, kept: int = KEPT) -> None:
        # Signing takes longer than drawing a thumbnail; what XMP says of its origin it has.
        self.folder, self.marks, self.kept = folder, replace(marks, signer=None), kept
        self._made = 0

    def of(self, picture: Path) -> Path:
        """Where the thumbnail of a PNG lies. Raises UserError for what is no picture, and for a full disk."""
        path = self.folder / f"{picture.stem}.webp"
        state = picture.stat()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns == state.st_mtime_ns:
                return path
        image = open_picture(picture)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
        origin = self.marks.origin(image, written_request(read_texts(picture)))
        self.folder.mkdir(exist_ok=True)
        if self._made % SWEEP == 0:
            self._make_room()
        with whole_file(path) as temporary:
            with temporary.open("wb") as file:
                encode(image, file, {}, Encoding("webp", QUALITY), origin)
            os.utime(temporary, ns=(state.st_mtime_ns, state.st_mtime_ns))
        self._made += 1
        return path

    def remove(self, name: str) -> None:
        (self.folder / f"{name}.webp").unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Remove the thumbnails of the oldest pictures, so that not more than `kept` bytes stay."""
        states = sorted(
            (path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*.webp")
        )
        used = sum(size for _, size, _ in states)
        for _, size, path in states:
            if used <= self.kept:
                return
            path.unlink(missing_ok=True)
            used -= size


def written_request(texts: Mapping[str, str]) -> Request | None:
    """The request among a picture's texts; None where they say none, or what cannot be drawn."""
    with contextlib.suppress(UserError, KeyError):
        return request_of(texts)
    return None


def converted(path: Path, encoding: Encoding, marks: Marks) -> bytes:
    """A picture of the gallery as bytes; a PNG as it lies there. Raises UserError where it cannot be read."""
    if encoding.format == "png":
        return path.read_bytes()
    data, texts = io.BytesIO(), read_texts(path)
    request = written_request(texts)  # of one that says none, nothing is said
    with Image.open(path, formats=("PNG",)) as image:
        pixels = to_rgb(image) if encoding.format == "jpeg" else image
        encode(pixels, data, texts, encoding, marks.origin(pixels, request))
    return data.getvalue()


def told_request(path: Path) -> dict[str, Any] | None:
    """What a picture, of ours or of another program, says of how it was drawn, as JSON; None if nothing."""
    try:
        return read_request(path).filled_in("json")
    except UserError:
        return None
