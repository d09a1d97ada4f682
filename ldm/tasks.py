"""What kinds of models draw from: img2img, inpainting, instruct-pix2pix and upscalers.

A kind is told by the channels that a U-Net takes beside its latents. Here is where a picture begins, what of
its image is concatenated with the latents in every step, and what a kind is drawn with by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ldm.arguments import Beside
from ldm.checkpoint import Parts
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.guidance import CFG, Guidance, InstructPix2Pix
from ldm.inputs import InMemory, fit_image, fit_mask, read_file, size_of, take
from ldm.noise import Noise
from ldm.request import Request
from ldm.schedule import Grid
from ldm.scheduler_config import noise_levels


class Kind(Enum):
    """What a model draws from: told by the channels that its U-Net takes beside the c of latents."""

    TEXT = "0"  # and from text and an image that it begins with
    UPSCALE = "3"  # a low-resolution picture
    PIX2PIX = "c"  # the latents of a picture to change
    INPAINT = "1 + c"  # a mask, and the latents of the picture without what it covers


def kind_of(parts: Parts) -> Kind:
    """Raises UserError for a U-Net with other channels."""
    taken, own = parts.unet.config.in_channels, parts.vae.latent_channels
    kinds = {0: Kind.TEXT, 3: Kind.UPSCALE, own: Kind.PIX2PIX, own + 1: Kind.INPAINT}
    if taken - own not in kinds:
        raise UserError(f"a U-Net of {taken} input channels does not fit a VAE of {own}")
    return kinds[taken - own]


def check_upscaler(parts: Parts, name: str) -> None:
    """Raise UserError for a model, of this name, that does not enlarge a small picture."""
    if kind_of(parts) is not Kind.UPSCALE:
        raise UserError(f"{name} is no upscaler: its U-Net takes no small picture beside its latents")


def defaults(parts: Parts, has_image: bool) -> dict[str, Any]:
    """Fields of a Request -> what they are where neither the caller nor ldm.json says, as in diffusers."""
    kind, is_xl = kind_of(parts), parts.text_encoder_2 is not None
    values = {"num_inference_steps": 50, "guidance_scale": 7.5}
    match kind:
        case Kind.TEXT:
            values["guidance_scale"] = 5.0 if is_xl else 7.5
            values |= {"strength": 0.3 if is_xl else 0.8} if has_image else {}
        case Kind.UPSCALE:
            values = {"num_inference_steps": 75, "guidance_scale": 9.0, "noise_level": 20}
        case Kind.PIX2PIX:
            values |= {"num_inference_steps": 100, "image_guidance_scale": 1.5}
        case Kind.INPAINT:
            values["strength"] = 1.0
    if "timestep_cond" in parts.unet.config.conditioning:  # LCM
        values |= {"num_inference_steps": 4, "guidance_scale": 8.5}
    if parts.requires_aesthetics_score:
        values |= {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
    return values


def check(request: Request, has_image: bool, has_mask: bool, parts: Parts) -> None:
    """Raise UserError for what this model needs and is not given, and for what would mean nothing to it."""
    kind = kind_of(parts)
    if kind is not Kind.TEXT and not has_image:
        raise UserError(
            f"this model draws from an image ({kind.name.lower()}): give one (image, --init-image)"
        )
    if kind is Kind.INPAINT and not has_mask:
        raise UserError("this model draws what a mask covers: give one (mask_image, --mask)")
    two_encoders = parts.text_encoder is not None and parts.text_encoder_2 is not None
    sizes = [name for name in Request.model_fields if name.endswith(("_size", "_top_left"))]
    rules = [
        (kind is Kind.INPAINT, "inpainting models, whose U-Net takes 9 channels,", ["mask_image"]),
        (
            has_image and kind in (Kind.TEXT, Kind.INPAINT),
            "img2img and inpainting, with an image,",
            ["strength"],
        ),
        (kind is Kind.PIX2PIX, "instruct-pix2pix models", ["image_guidance_scale"]),
        (kind is Kind.UPSCALE, "upscalers, as --model,", ["noise_level"]),
        (two_encoders, "models with two text encoders", ["prompt_2", "negative_prompt_2"]),
        ("time_ids" in parts.unet.config.conditioning, "SDXL models", sizes),
        (parts.requires_aesthetics_score, "SDXL refiners", ["aesthetic_score", "negative_aesthetic_score"]),
    ]
    for taken, who, names in rules:
        for name in names:
            given = has_mask if name == "mask_image" else getattr(request, name) is not None
            if given and not taken:
                raise UserError(f"{name} is not allowed here: only {who} can use it")
    if request.noise_level is not None and request.noise_level > parts.max_noise_level:
        raise UserError(
            f"noise_level {request.noise_level} is not allowed: this model takes 0 to {parts.max_noise_level}"
        )


def guidance_of(request: Request, parts: Parts) -> Guidance:
    """As in diffusers, a scale of at most 1 means no guidance, and a model told the scale needs none."""
    scale, image_scale = request.guidance_scale or 1.0, request.image_guidance_scale
    if scale <= 1 or "timestep_cond" in parts.unet.config.conditioning:
        return CFG(1.0)
    if image_scale is None:
        return CFG(scale, request.guidance_rescale)
    return InstructPix2Pix(scale, image_scale, request.guidance_rescale) if image_scale >= 1 else CFG(1.0)


def cut(grid: Grid, request: Request) -> Grid:
    """The part of a grid that is drawn: its last `strength`. Raises UserError where that is nothing."""
    skipped = len(grid.timesteps) - request.num_steps
    if request.strength is None or skipped == 0:
        return grid
    if request.num_steps == 0:
        raise UserError(
            f"strength {request.strength:g} of {len(grid.timesteps)} steps leaves none: give more of either"
        )
    return replace(grid, sigmas=grid.sigmas[skipped:], timesteps=grid.timesteps[skipped:])


# --- images ----------------------------------------------------------------------------------------------


def read_images(request: Request, beside: Beside) -> tuple[Request, InMemory | None, InMemory | None]:
    """(the request with the SHA-256 of its files, image, mask). Raises UserError, also for a changed file."""
    image, mask = take(beside.image, 3), take(beside.mask_image, 1)
    if request.image is not None:
        image, digest = read_file(request.image, request.image_sha256)
        request = request.replace(image_sha256=digest)
    if request.mask_image is not None:
        mask, digest = read_file(request.mask_image, request.mask_image_sha256)
        request = request.replace(mask_image_sha256=digest)
    return request, image, mask


def picture_size(image: InMemory, kind: Kind, factor: int) -> tuple[int, int]:
    """(height, width) of what is drawn from an image: its own, or `factor` times that, cut to fit."""
    grown, unit = (factor, math.lcm(8, factor**2)) if kind is Kind.UPSCALE else (1, math.lcm(8, factor))
    height, width = (side * grown // unit * unit for side in size_of(image))
    return height, width


@dataclass(frozen=True, eq=False)
class Encoded:
    """The Gaussian over latents that an image encodes to: [1, c, h, w] each, scaled as the U-Net has them."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """[B, c, h, w] from as much unit noise."""
        return self.mean + self.std * noise.to(self.mean)


@dataclass(frozen=True, eq=False)
class Start:
    """How the pictures of a call begin, and what of an image the U-Net is told. Nothing for plain text."""

    image: Encoded | None = None  # to begin with, noised
    latents: Tensor | None = None  # [1, c, h, w] of the picture to change (instruct-pix2pix)
    low_res: Tensor | None = None  # [1, 3, h, w] in -1..1 (upscaler)
    signal: float = 1.0  # alphas_cumprod of its noise level
    masked: Encoded | None = None  # inpainting: the picture, grey where it is drawn anew
    mask: Tensor | None = None  # [1, 1, h, w], 1 where it is
    pixels: Tensor | None = None  # [1, 3, H, W] in 0..1: what stays
    mask_pixels: Tensor | None = None  # [1, 1, H, W]

    def begin(
        self,
        noise: Noise,
        given: Tensor | None,
        shape: tuple[int, int, int],
        grid: Grid,
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None]:
        """The first state x [B, C, h, w] and what is concatenated [B, C', h, w]; `given` is unit noise.

        Draws from each picture's generator in diffusers' order.
        """
        concat = self.latents
        if self.low_res is not None:
            low_noise = noise.initial((3, *shape[1:])).to(device)
            concat = self.signal**0.5 * self.low_res + (1 - self.signal) ** 0.5 * low_noise
        image = None if self.image is None else self.image.sample(noise.initial(shape))
        unit = (noise.initial(shape) if given is None else given).to(device, torch.float32)
        x = unit * grid.initial_scale if image is None else image + float(grid.sigmas[0]) * unit
        if self.masked is not None and self.mask is not None:
            masked = self.masked.sample(noise.initial(shape))
            concat = torch.cat([self.mask.expand(len(masked), -1, -1, -1), masked], 1)
        return x, None if concat is None else concat.expand(len(x), -1, -1, -1)

    def finish(self, images: Tensor) -> Tensor:
        """Finished pictures [B, 3, H, W] in 0..1, with what the mask does not cover as it was."""
        if self.pixels is None or self.mask_pixels is None:
            return images
        return torch.where(self.mask_pixels.to(images.device) > 0, images, self.pixels.to(images))


def start(
    request: Request, beside: Beside, parts: Parts, encode: Callable[[Tensor], Encoded], device: torch.device
) -> Start:
    """Read, resize and encode the images of a resolved request; `encode` takes [1, 3, H, W] in 0..1."""
    _, image, mask = read_images(request, beside)
    if image is None:
        return Start()
    size, factor = (request.height or 0, request.width or 0), parts.vae.downscale
    small = (size[0] // factor, size[1] // factor)
    match kind_of(parts):
        case Kind.UPSCALE:
            low_res = 2 * fit_image(image, small, bicubic=True).to(device) - 1
            levels = noise_levels(parts.low_res_scheduler or {})
            return Start(low_res=low_res, signal=float(levels[request.noise_level or 0]))
        case Kind.PIX2PIX:
            # These latents are not scaled: so the models were trained.
            mean = encode(fit_image(image, size)).mean
            return Start(latents=mean / parts.vae.scaling_factor + parts.vae.shift_factor)
        case Kind.INPAINT if mask is not None:
            pixels, drawn = fit_image(image, size), fit_mask(mask, size)
            return Start(
                image=None if request.strength == 1 else encode(pixels),
                masked=encode(torch.where(drawn > 0, 0.5, pixels)),
                mask=torch.nn.functional.interpolate(drawn, small).to(device),
                pixels=pixels,
                mask_pixels=drawn,
            )
        case _:
            return Start(image=encode(fit_image(image, size)))


def branches(
    cond: Conditioning, uncond: Conditioning, concat: Tensor | None, kind: Kind
) -> dict[str, Conditioning]:
    """What a guidance may ask for: with the text ("cond") and without, in pix2pix also without the image."""
    if kind is Kind.PIX2PIX and concat is not None:
        return {
            "cond": replace(cond, concat=concat),
            "image": replace(uncond, concat=concat),
            "uncond": replace(uncond, concat=torch.zeros_like(concat)),
        }
    return {"cond": replace(cond, concat=concat), "uncond": replace(uncond, concat=concat)}
