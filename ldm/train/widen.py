"""Widened networks: a text-to-image U-Net for inpainting, and a VAE and its U-Net to more latent channels.

For inpainting as runwayml's stable-diffusion-inpainting began. Of more latent channels the first are the old
ones, so that what a U-Net has learnt of them holds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from ldm.adapters.layers import share
from ldm.checkpoint import Parts
from ldm.errors import UserError
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet, build
from ldm.tasks import Kind, kind_of


def widen(parts: Parts) -> Parts:
    """Parts whose U-Net takes a mask and masked latents too; an inpainting model's are returned as they are.

    Raises:
        UserError: for a model that takes something else beside its latents.
    """
    kind = kind_of(parts)
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


# --- more latent channels ----------------------------------------------------------------------------------


@torch.no_grad()
def widen_vae(vae: AutoencoderKL | AutoencoderTiny, latent_channels: int) -> AutoencoderTiny:
    """An autoencoder of more latent channels, the first of them those of `vae`.

    The new ones are random views of the encoder's last features, and the decoder does not look at them yet:
    it draws what `vae` draws.

    Raises:
        UserError: for fewer channels than `vae` has, or another kind than AutoencoderTiny.
    """
    if not isinstance(vae, AutoencoderTiny):
        raise UserError(f"a {type(vae).__name__} cannot be widened: an AutoencoderTiny can")
    _check_wider(latent_channels, vae.latent_channels, "VAE")
    wide = build(vae.to_config() | {"latent_channels": latent_channels})
    assert isinstance(wide, AutoencoderTiny)
    wide.decoder.get_parameter("layers.0.weight").zero_()
    _copy_into(wide, vae)
    return wide


@torch.no_grad()
def widen_latents(unet: UNet, latent_channels: int) -> UNet:
    """The U-Net for a widened VAE: at first it ignores the new channels, and answers 0 for them.

    Raises:
        UserError: for fewer channels than `unet` has.
    """
    _check_wider(latent_channels, unet.config.in_channels, "U-Net")
    wide = build(unet.to_config() | {"in_channels": latent_channels, "out_channels": latent_channels})
    assert isinstance(wide, UNet)
    for name in ("conv_in.weight", "conv_out.weight", "conv_out.bias"):
        wide.get_parameter(name).zero_()
    _copy_into(wide, unet)
    return wide


def _check_wider(wanted: int, have: int, network: str) -> None:
    if wanted < have:
        raise UserError(
            f"{wanted} latent channels are fewer than the {have} of the {network}: it can only widen"
        )


def _copy_into(wide: nn.Module, narrow: nn.Module) -> None:
    """Each tensor into the first places of the one of its name; the other places stay as they are."""
    into = wide.state_dict()
    for name, value in narrow.state_dict().items():
        into[name][tuple(slice(n) for n in value.shape)].copy_(value)
