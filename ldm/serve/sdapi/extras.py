"""AUTOMATIC1111's "extras": a picture made larger by interpolation, with what it says of itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps

from ldm.errors import UserError
from ldm.images.formats import encode
from ldm.images.opening import open_picture
from ldm.images.texts import read_texts
from ldm.request.fields import short
from ldm.serve.service import Service
from ldm.serve.uploads import decode_base64

# "None" leaves the size to Lanczos, as it does there.
WAYS = {
    "None": Image.Resampling.LANCZOS,
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
}
FACES = ("gfpgan_visibility", "codeformer_visibility")


def extra(service: Service, given: Mapping[str, Any], image: Any) -> str:
    """A picture in base64, enlarged as asked, as base64 of a PNG. Raises UserError, naming the field."""
    for name in FACES:
        if given.get(name):
            raise UserError(f"{name} {short(given[name])} is not allowed: this server mends no faces")
    second = given.get("upscaler_2") or "None"
    if second != "None" and given.get("extras_upscaler_2_visibility"):
        raise UserError("upscaler_2 is not allowed: this server takes one at a time")
    way = WAYS.get(str(given.get("upscaler_1") or "None"))
    if way is None:
        raise UserError(f"upscaler_1 {short(given['upscaler_1'])} is not allowed: here {', '.join(WAYS)}")
    data = decode_base64(str(image), "image")
    path = service.uploads.folder / service.uploads.put(data)
    old, out = open_picture("image", io.BytesIO(data)), io.BytesIO()
    encode(resized(service, given, old, way), out, read_texts(path))
    return base64.b64encode(out.getvalue()).decode()


def resized(
    service: Service, given: Mapping[str, Any], image: Image.Image, way: Image.Resampling
) -> Image.Image:
    """By a factor (`resize_mode` 0), or to a size (1), whose shape is cut out of it with `upscaling_crop`."""
    if given.get("resize_mode", 0) == 0:
        factor = number(given.get("upscaling_resize", 2), "upscaling_resize")
        return image.resize(bounded(service, image.width * factor, image.height * factor), way)
    width, height = (
        number(given.get(f"upscaling_resize_{side}", 512), f"upscaling_resize_{side}") for side in "wh"
    )
    if given.get("upscaling_crop", True):
        return ImageOps.fit(image, bounded(service, width, height), way)
    scale = min(width / image.width, height / image.height)
    return image.resize(bounded(service, image.width * scale, image.height * scale), way)


def bounded(service: Service, width: float, height: float) -> tuple[int, int]:
    most = 2 * service.limits.side
    if max(width, height) > most:
        raise UserError(f"upscaling_resize is not allowed beyond {most} pixels a side")
    return max(1, round(width)), max(1, round(height))


def number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**20:
        raise UserError(f"{name} {short(value)} is not allowed: it must be a number above 0")
    return float(value)
