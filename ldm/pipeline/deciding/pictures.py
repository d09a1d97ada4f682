"""The pictures that a drawing begins with: read, checked, their masks made ready, fitted to its size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from ldm.control import Pictures
from ldm.errors import UserError, printable
from ldm.images.fitting import (
    InMemory,
    fit_image,
    fit_mask,
    read_file,
    reshaped,
    same_shape,
    size_of,
    take,
)
from ldm.images.masks import as_image, crop_region, extended, feathered, filled, shaped
from ldm.images.opening import to_mask, to_rgb
from ldm.images.pixels import to_tensor
from ldm.models.kind import Kind
from ldm.pipeline.inputs import Inputs, count_images
from ldm.pipeline.model import Model
from ldm.pipeline.start import Place
from ldm.request import Request


@dataclass(frozen=True, eq=False)
class Images:
    """The decoded image and mask of a request, and the SHA-256 of their files.

    share: how much of each pixel is taken from what is drawn, where that is not the mask itself.
    """

    image: InMemory | None = None
    mask: InMemory | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # fields of a Request
    share: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the image in pixels."""
        return None if self.image is None else size_of(self.image)


NO_IMAGES = Images()


def read_images(model: Model, requests: Sequence[Request], inputs: Inputs) -> Images:
    """The image and mask of requests, from memory or their files. Raises UserError, also if one changed.

    Alpha means another thing in each: an image is laid on white; of a mask it is what is painted. In place of
    latents an image without pixels stands, as large as they are of.
    """
    check_images(model, requests, inputs)
    request = requests[0]
    if inputs.image_latents is not None:
        height, width = (model.vae.downscale * side for side in inputs.image_latents.shape[-2:])
        return Images(torch.empty(1, 3, height, width, device="meta"))
    image, mask, digests = inputs.image, inputs.mask_image, dict[str, str]()
    image, mask = image if image is None else take(image, 3), mask if mask is None else take(mask, 1)
    if request.image is not None:
        image, digests["image_sha256"] = read_file(request.image, request.image_sha256)
    if request.mask_image is not None:
        mask, digests["mask_image_sha256"] = read_file(
            request.mask_image, request.mask_image_sha256, to_rgb if request.is_old else to_mask
        )
    if image is not None and mask is not None and not same_shape(size_of(image), size_of(mask)):
        shapes = [f"{width}x{height}" for height, width in (size_of(mask), size_of(image))]
        name = printable(request.mask_image or "mask_image")
        warnings.warn(
            f"{name} has {shapes[0]} pixels and the picture it masks {shapes[1]}: "
            "it is stretched to fit; give one of the same shape",
            stacklevel=3,
        )
    if not request.changes_mask:
        return Images(image, mask, digests)
    return ready(request, image, mask, digests)


def shown(inputs: Inputs, images: Images) -> Pictures:
    """What a drawing's controls may show. A picture of latents has no pixels, and is none."""
    image = None if isinstance(images.image, Tensor) and images.image.is_meta else images.image
    return Pictures(inputs.control_images or (), image, images.mask)


def ready(
    request: Request, image: InMemory | None, mask: InMemory | None, digests: Mapping[str, str]
) -> Images:
    """The image extended, and the mask as the request wants it. Raises UserError where there is none."""
    if isinstance(image, tuple) or isinstance(mask, tuple):
        raise UserError("a call extends one picture, or changes one mask: give the others to other calls")
    if image is None:
        raise UserError(f"{request.changes_mask} is about a picture: give one (image, --init-image)")
    if mask is None and request.extend is None:
        raise UserError(f"{request.changes_mask} is about a mask: give one (mask_image, --mask)")
    picture, covered = as_image(image, "RGB"), None if mask is None else as_image(mask, "L")
    if request.extend is not None:
        picture, covered = extended(picture, covered, request.extend)
    assert covered is not None
    if covered.size != picture.size:
        covered = covered.resize(picture.size)
    soft = bool(request.soft_mask)
    covered = shaped(covered, bool(request.mask_invert), request.mask_grow or 0, soft)
    binary = covered.point([0] + [255] * 255) if soft else covered
    return Images(picture, covered, digests, feathered(binary, request.mask_blur or 0.0))


def check_images(model: Model, requests: Sequence[Request], inputs: Inputs) -> None:
    """Raise UserError for another number of images than one, or one for each prompt."""
    for name in ("image", "mask_image", "image_latents"):
        given = getattr(inputs, name)
        if given is not None and (count := count_images(given)) not in (1, len(requests)):
            raise UserError(
                f"{count} pictures as {name} for {len(requests)} prompts: give one, or one for each"
            )
    if inputs.image_latents is not None and (model.kind is not Kind.TEXT or inputs.mask_image is not None):
        raise UserError("latents as the image are for drawing from an image alone: give the picture itself")


def in_shape(images: Images, request: Request) -> Images:
    """The images in the shape of a resolved request's picture, where it crops or fills.

    Of a part of the picture alone (padding_mask_crop) that part is resized, as in A1111. Raises UserError.
    """
    mode = request.resize_mode
    if mode == "latent" and images.mask is not None:
        raise UserError("resize_mode latent is for an image without a mask: give crop, fill or resize")
    if mode not in ("crop", "fill") or request.padding_mask_crop is not None:
        return images

    def each(image: InMemory | None, kind: str) -> InMemory | None:
        if image is None or isinstance(image, tuple):
            return image and tuple(reshaped(as_image(one, kind), request.size, mode) for one in image)
        return reshaped(as_image(image, kind), request.size, mode)

    share = None if images.share is None else reshaped(images.share, request.size, mode)
    return replace(images, image=each(images.image, "RGB"), mask=each(images.mask, "L"), share=share)


def masked(request: Request, images: Images) -> tuple[Tensor, Tensor, Place]:
    """Of a resolved request what is drawn on, where, and its place in the picture.

    [1 or prompts, 3, H, W], [1 or prompts, 1, H, W]. Raises UserError for a mask that covers nothing.
    """
    image, mask, share, size = images.image, images.mask, images.share, request.size
    assert image is not None
    assert mask is not None
    if share is None:
        picture, drawn = fit_image(image, size), fit_mask(mask, size)
        place = Place(picture, drawn)
    elif request.padding_mask_crop is None:
        picture, drawn = fit_image(image, size), fit_mask(mask, size, bool(request.soft_mask))
        place = Place(picture, fit_mask(share, size, soft=True))
    else:
        assert isinstance(image, Image.Image)
        assert isinstance(mask, Image.Image)
        box = crop_region(share, size, request.padding_mask_crop) or (0, 0, *image.size)
        picture = fit_image(image.crop(box), size)
        drawn = fit_mask(mask.crop(box), size, bool(request.soft_mask))
        place = Place(to_tensor(image), fit_mask(share, image.size[::-1], soft=True), box)
    if not bool((drawn > 0).flatten(1).any(1).all()):
        raise UserError("the mask covers nothing: make white, or paint, what is to be drawn anew")
    return filled(picture, drawn) if request.mask_fill == "blur" else picture, drawn, place
