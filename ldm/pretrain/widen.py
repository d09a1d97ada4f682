"""A VAE and its U-Net widened to more latent channels: the first are the old ones."""

from __future__ import annotations

import torch
from torch import nn

from ldm.errors import UserError
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet, build


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
