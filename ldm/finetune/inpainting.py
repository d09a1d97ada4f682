"""A text-to-image U-Net widened for inpainting, as stable-diffusion-inpainting began; and its input."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.adapters.layers import share
from ldm.checkpoint import Parts
from ldm.errors import UserError
from ldm.models import UNet
from ldm.models.kind import Kind


def widen(parts: Parts) -> Parts:
    """Parts whose U-Net takes a mask and masked latents too; an inpainting model's are returned as they are.

    Raises:
        UserError: for a model that takes something else beside its latents.
    """
    kind = parts.kind
    if kind is Kind.INPAINT:
        return parts
    if kind is not Kind.TEXT:
        raise UserError(
            f"this model draws from an image ({kind.name.lower()}): its U-Net takes "
            f"{parts.unet.config.in_channels} channels; start inpainting from a text-to-image model"
        )
    # The U-Net is no longer that of a file.
    return replace(parts, unet=widen_unet(parts.unet, parts.vae.latent_channels), weights=None)


def widen_unet(unet: UNet, latent_channels: int = 4) -> UNet:
    """A U-Net of c input channels as one of 2 c + 1: noisy latents, mask [1], masked latents.

    The new input weights are zero, so that whatever the mask and masked latents are, the output is at first
    the old one (the model card of runwayml/stable-diffusion-inpainting: "5 additional input channels [...]
    whose weights were zero-initialized"); all other tensors are those of `unet`.

    Raises:
        UserError: for a U-Net of neither c nor 2 c + 1 input channels.
    """
    taken, wanted = unet.config.in_channels, 2 * latent_channels + 1
    if taken == wanted:
        return unet
    if taken != latent_channels:
        raise UserError(
            f"a U-Net of {taken} input channels cannot be made one for inpainting: one of {latent_channels} "
            f"can, and one of {wanted} is one"
        )
    wide = share(unet)
    wide.config = replace(unet.config, in_channels=wanted)
    old = unet.conv_in.weight
    weight = F.pad(old.detach(), (0, 0, 0, 0, 0, wanted - taken))  # it keeps the memory format
    wide.conv_in.weight = nn.Parameter(weight, old.requires_grad)
    wide.conv_in.in_channels = wanted
    return wide


def inpainting_input(noisy: Tensor, masks: Tensor, masked_latents: Tensor) -> Tensor:
    """The U-Net's input [B, 9, h, w]: noisy latents, the mask at their size, the masked pictures' latents.

    The order of channels and the nearest pixels of the mask are those of drawing (`ldm.pipeline.start`).
    """
    small = F.interpolate(masks, size=noisy.shape[2:])
    return torch.cat([noisy, small.to(noisy), masked_latents], dim=1)
