"""Control pictures: read, preprocessed, and fitted to what is drawn."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import UserError, printable
from ldm.images.fitting import (
    InMemory,
    OneInMemory,
    fit_image,
    fit_mask,
    read_file,
    same_shape,
    size_of,
    take,
)
from ldm.images.masks import as_image
from ldm.images.opening import to_mask
from ldm.request import ControlUse

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a drawing has of pictures beside its controls' files: the k-th control's, in memory; its own."""

    given: tuple[InMemory | None, ...] = ()
    image: InMemory | None = None
    mask: InMemory | None = None

    def of(self, k: int) -> InMemory | None:
        """The k-th control's, where it is given in memory."""
        return self.given[k] if k < len(self.given) else None


def control_picture(use: ControlUse, k: int, pictures: Pictures, size: Size, repaints: bool) -> Tensor:
    """[1, 3, H, W] in 0..1, and -1 where an inpainting ControlNet is to fill it; `repaints`: 0 there.

    Raises UserError for a picture that is not there, has changed, or that the preprocessor cannot take.
    """
    image = _source(use, k, pictures)
    if isinstance(image, tuple):
        raise UserError("a control has one picture for all prompts: give the others to other calls")
    if use.preprocess is None:
        return fit_image(_cropped(image, use, size), size)
    from ldm.preprocess import control_values, find, preprocess, read_options, source_of

    name, *given = use.preprocess.split(":")
    options: dict[str, Any] = {**read_options(name, dict(_option(each) for each in given))}
    fitted = as_image(_cropped(image, use, size), "RGB").resize(size[::-1], Image.Resampling.LANCZOS)
    mask = None
    if find(name).masked:
        if pictures.mask is None or isinstance(pictures.mask, tuple):
            raise UserError(f"control {name} shows what a mask leaves: give one (mask_image, --mask)")
        mask = fit_mask(pictures.mask, size)[0, 0].numpy().astype(np.float32)
    values = torch.from_numpy(control_values(preprocess(source_of(fitted), name, mask=mask, **options)))[None]
    return values.clamp_min(0) if repaints else values


def depth_map(use: ControlUse, k: int, pictures: Pictures) -> Tensor:
    """[1, 1, H, W] of any range: of a file its levels, of 8 or 16 bits, else the luminance."""
    from ldm.preprocess.pictures import to_levels

    if use.image is not None:
        return torch.from_numpy(np.asarray(read_file(use.image, use.image_sha256, to_levels)[0]))[None, None]
    image = _source(use, k, pictures)
    if isinstance(image, tuple):
        raise UserError("a drawing has one depth map for all prompts: give the others to other calls")
    return torch.from_numpy(np.asarray(as_image(image, "L"), dtype=np.float32))[None, None]


def control_mask(use: ControlUse, size: Size) -> Tensor | None:
    """[1, 1, H, W], how much it acts at each place; None for everywhere."""
    if use.mask is None:
        return None
    return fit_mask(read_file(use.mask, use.mask_sha256, to_mask)[0], size, soft=True)


def with_digests(use: ControlUse) -> ControlUse:
    """A use that notes which files its pictures were. Raises UserError, also if one changed."""
    found = {}
    if use.image is not None:
        found["image_sha256"] = read_file(use.image, use.image_sha256)[1]
    if use.mask is not None:
        found["mask_sha256"] = read_file(use.mask, use.mask_sha256, to_mask)[1]
    return use.replace(**found) if found else use


def _source(use: ControlUse, k: int, pictures: Pictures) -> InMemory:
    if use.image is not None:
        return read_file(use.image, use.image_sha256)[0]
    image = pictures.of(k)
    if image is None:
        image = pictures.image
    if image is None:
        raise UserError(
            f"control {printable(Path(use.model).name)} has no picture: give it one (image=FILE, "
            "control_image)"
        )
    taken = take(image, 3)
    assert taken is not None
    return taken


def _cropped(image: OneInMemory, use: ControlUse, size: Size) -> OneInMemory:
    """Its middle in the shape of what is drawn, where it is to be cropped; else all of it, stretched."""
    own = size_of(image)
    if same_shape(own, size):
        return image
    if use.resize == "stretch":
        name, (height, width) = printable(use.image or "the control picture"), own
        warnings.warn(
            f"{name} has {width}x{height} pixels and the drawing {size[1]}x{size[0]}: it is stretched to "
            "fit; resize=crop keeps its shape",
            stacklevel=4,
        )
        return image
    share = min(own[0] / size[0], own[1] / size[1])
    height, width = (min(round(side * share), whole) for side, whole in zip(size, own, strict=True))
    top, left = (own[0] - height) // 2, (own[1] - width) // 2
    if isinstance(image, Tensor):
        return image[..., top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    return name.strip().replace("-", "_"), value.strip() if equals else True
