"""Pictures of every kind, whole and broken, and what an examination of their folder finds."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from ldm.dataset.examine import examine


def scene(seed, size=(96, 72), mode="RGB"):
    """Smooth, and unlike that of any other seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, len(mode)), dtype=np.uint8)
    return Image.fromarray(small, mode if mode == "CMYK" else None).resize(size, Image.Resampling.BILINEAR)


def encoded(image, form, **values):
    data = io.BytesIO()
    image.save(data, form, **values)
    return data.getvalue()


def exif(orientation):
    values = Image.Exif()
    values[0x0112] = orientation
    return values


def huge_png(side):
    """A PNG whose header promises side x side pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def make_folder(tmp_path):
    """A folder with one good picture, and room for a bad one."""
    (tmp_path / "mine").mkdir()
    scene(0).save(tmp_path / "mine" / "good.png")
    return tmp_path / "mine"


def examine_pictures(folder, **values):
    return examine(folder, **{"resolution": 64, "missing_caption": "empty"} | values)


def found_in(folder, **values):
    """(effect, kind, file) of all findings but those of missing captions."""
    return [
        (found.effect, found.kind, found.path and found.path.relative_to(folder).as_posix())
        for found in examine_pictures(folder, **values).findings
        if found.kind != "missing caption"
    ]


JPEG, PNG = encoded(scene(1), "JPEG", quality=95), encoded(scene(1), "PNG")
WEBP, GIF = encoded(scene(1), "WEBP"), encoded(scene(1), "GIF")
HALF = scene(3)
HALF.putalpha(Image.linear_gradient("L").resize(HALF.size))
