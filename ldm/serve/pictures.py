"""Pictures on disk: in other formats, and what they say of themselves and of their origin."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.images.formats import Encoding, encode
from ldm.images.png import read_request, request_of
from ldm.images.provenance import Marks
from ldm.images.texts import read_texts


def converted(path: Path, encoding: Encoding, marks: Marks) -> bytes:
    """A picture of the gallery as bytes; a PNG as it lies there. Raises UserError where it cannot be read."""
    if encoding.format == "png":
        return path.read_bytes()
    data, texts, request = io.BytesIO(), read_texts(path), None
    with contextlib.suppress(UserError, KeyError):  # of one that says none, nothing is said
        request = request_of(texts)
    with Image.open(path, formats=("PNG",)) as image:
        encode(pixels := image.convert("RGB"), data, texts, encoding, marks.origin(pixels, request))
    return data.getvalue()


def told_request(path: Path) -> dict[str, Any] | None:
    """What a picture, of ours or of another program, says of how it was drawn, as JSON; None if nothing."""
    try:
        return read_request(path).filled_in("json")
    except UserError:
        return None
