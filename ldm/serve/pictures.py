"""Finished pictures in other formats, with all that they say of themselves."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from ldm.images.formats import Encoding, encode
from ldm.images.texts import read_texts


def converted(path: Path, encoding: Encoding) -> bytes:
    """A picture of the gallery as bytes; a PNG as it lies there. Raises UserError where it cannot be read."""
    if encoding.format == "png":
        return path.read_bytes()
    data, texts = io.BytesIO(), read_texts(path)
    with Image.open(path, formats=("PNG",)) as image:
        encode(image.convert("RGB"), data, texts, encoding)
    return data.getvalue()
