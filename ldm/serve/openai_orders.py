"""What OpenAI's image API asks for, as our requests: sizes, qualities, formats, pictures to edit.

As other local servers do, it takes `seed`, `negative_prompt`, `num_inference_steps`, `guidance_scale` and
some more fields of a `Request` beside OpenAI's own. What cannot be done is refused, never left out silently.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.images.formats import QUALITY, Encoding
from ldm.images.opening import open_picture
from ldm.request import Request, field_named
from ldm.request.fields import short
from ldm.serve.service import Service

# Of a Request, what may stand beside OpenAI's own fields.
MORE = {
    *("seeds", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "sampler"),
    *("spacing", "eta", "clip_skip", "strength", "loras", "tiling", "prompt_grammar"),
}
# OpenAI's, which change nothing here: who asks, moderation, and how a retired model drew.
UNHEARD = {"user", "safety_identifier", "moderation", "style", "input_fidelity"}
QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
FORMATS = ("png", "jpeg", "webp")
MOST_PARTIALS = 3
# Our fields by OpenAI's names, for errors.
NAMES = {"height": "size", "width": "size", "seeds": "seed", "mask_image": "mask"}
USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


@dataclass(frozen=True)
class Order:
    """A request to OpenAI's API, read."""

    request: Request
    model: str
    encoding: Encoding
    as_url: bool = False
    stream: bool = False
    partials: int = 0
    quality: str = "auto"

    @property
    def told(self) -> dict[str, Any]:
        """What answers and events say alike."""
        background = "transparent" if self.request.transparent else "opaque"
        return {"background": background, "output_format": self.encoding.format, "quality": self.quality}


def read_order(service: Service, given: Mapping[str, Any], own: Mapping[str, Any]) -> Order:
    """An order of the fields given, as JSON or a form has them; `own` are ours that follow from an upload.

    Raises UserError, naming the field.
    """
    left = {name: value for name, value in given.items() if value is not None and name not in UNHEARD}
    count = service.limits.count(_whole(left.pop("n", 1), "n"))
    quality = _one_of(left.pop("quality", "auto"), "quality", QUALITIES)
    background = _one_of(left.pop("background", "auto"), "background", ("auto", "opaque", "transparent"))
    as_url = _one_of(left.pop("response_format", "b64_json"), "response_format", ("b64_json", "url")) == "url"
    encoding = _encoding(left.pop("output_format", "png"), left.pop("output_compression", None))
    stream = _one_of(str(left.pop("stream", "false")).lower(), "stream", ("true", "false")) == "true"
    partials = _whole(left.pop("partial_images", 0), "partial_images")
    if not 0 <= partials <= MOST_PARTIALS or (partials and not stream):
        raise UserError(f"partial_images {partials} is not allowed: it must be 0 to 3, and needs stream")
    if stream and as_url:
        raise UserError("response_format 'url' is not allowed here: a stream has its pictures in it")
    fields = {**own, **_size(left.pop("size", "auto")), "model": left.pop("model", None)}
    fields["prompt"] = left.pop("prompt", "")
    if quality == "low":
        fields["fast"] = True
    if background == "transparent":
        if encoding.format == "jpeg":
            raise UserError(
                "background 'transparent' is not allowed for jpeg: output_format must be png or webp"
            )
        fields["transparent"] = True
    request, model = service.read(fields | _more(left), count)
    return Order(request, model, encoding, as_url, stream, partials, _answered(quality))


def _more(left: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Request among what is not OpenAI's. Raises UserError for any other."""
    fields = {}
    for name, value in left.items():
        field = field_named(name)
        if field not in MORE:
            raise UserError(f"{name} {short(value)} is not allowed: this server does not know what it means")
        # What a form has is text; a seed is none yet for those who read it.
        fields[name] = int(value) if field == "seeds" and re.fullmatch(r"-?\d{1,19}", str(value)) else value
    return fields


def _size(value: Any) -> dict[str, int]:
    if value == "auto":
        return {}
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(value))
    if match is None:
        raise UserError(f"size {short(value)} is not allowed: it must be WIDTHxHEIGHT, or auto")
    return {"width": int(match[1]), "height": int(match[2])}


def _encoding(kind: Any, compression: Any) -> Encoding:
    kind = _one_of(kind, "output_format", FORMATS)
    if compression is None:
        return Encoding(kind)
    quality = _whole(compression, "output_compression")
    if not 0 <= quality <= 100 or (kind not in QUALITY and quality != 100):
        raise UserError(
            f"output_compression {quality} is not allowed: it must be from 0 to 100, for jpeg and webp"
        )
    return Encoding(kind, max(1, quality) if kind in QUALITY else None)


def _answered(quality: str) -> str:
    """As answers of today may name it: the names of older models have others by now."""
    return {"standard": "auto", "hd": "high"}.get(quality, quality)


def _one_of(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UserError(f"{name} {short(value)} is not allowed: it must be one of {', '.join(allowed)}")
    return str(value)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,9}", str(value)):
        raise UserError(f"{name} {short(value)} is not allowed: it must be a whole number")
    return int(value)


# --- pictures to edit ------------------------------------------------------------------------------------


def edited(service: Service, image: bytes, mask: bytes | None) -> dict[str, str]:
    """The fields of a request that draws on a picture: transparent parts of the mask, or else of the picture
    itself, are drawn anew. Raises UserError.
    """
    fields = {"image": service.uploads.put(image)}
    if mask is not None:
        service.uploads.put(mask, "mask")
        painted = transparent(mask, "mask")
        if painted is None:
            raise UserError("mask is not allowed without transparent parts: those are drawn anew")
    else:
        painted = transparent(image, "image")
    if painted is not None:
        fields["mask_image"] = service.uploads.put(painted, "mask_image")
    return fields


def transparent(data: bytes, what: str) -> bytes | None:
    """A mask of ours, white where a checked picture is transparent; None where it is nowhere."""

    def holes(image: Image.Image) -> Image.Image:
        if not image.has_transparency_data:
            return Image.new("L", image.size)
        return image.convert("RGBA").getchannel("A").point([255] * 128 + [0] * 128)

    mask = open_picture(what, io.BytesIO(data), holes)
    if mask.getextrema() == (0, 0):
        return None
    out = io.BytesIO()
    mask.save(out, "PNG")
    return out.getvalue()
