"""A VAE grown deeper, and its U-Net widened to more latent channels: the first are the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
def grown_vae(vae: AutoencoderKL | AutoencoderTiny, config: Mapping[str, Any]) -> AutoencoderTiny:
    """An autoencoder of `config` with the weights of `vae` where they fit.

    Of the same depth it is `vae`, widened. A deeper one has its new levels at the side of the pictures, with
    random weights: what `vae` does with a picture it is to learn to do with one of twice the size.

    Raises:
        UserError: for fewer channels or levels than `vae` has, or another kind than AutoencoderTiny.
    """
    wide, deep = widen_vae(vae, config["latent_channels"]), build(config)
    if not isinstance(deep, AutoencoderTiny) or deep.downscale < wide.downscale:
        raise UserError(
            f"{config.get('_class_name')}: what is grown from an AutoencoderTiny "
            f"of {len(wide.config.num_encoder_blocks)} levels is another of as many or more"
        )
    if deep.to_config() == wide.to_config():
        return wide
    more = len(deep.encoder.layers) - len(wide.encoder.layers)
    for i, layer in enumerate(wide.encoder.layers):
        _copy_if_alike(deep.encoder.layers[i + more], layer)
    for i, layer in enumerate(wide.decoder.layers):
        _copy_if_alike(deep.decoder.layers[i], layer)
    return deep


def _copy_if_alike(into: nn.Module, layer: nn.Module) -> None:
    old = layer.state_dict()
    if [value.shape for value in into.state_dict().values()] == [value.shape for value in old.values()]:
        into.load_state_dict(old)


@torch.no_grad()
def scale_latents(vae: AutoencoderTiny, factors: Tensor) -> None:
    """Multiply each latent channel by its factor, fp32 [c], where it is made, and divide it where it is read.

    Between the two is the decoder's soft clamp, 3 tanh(z / 3): what is made larger it bends more, and the
    decoder has to learn a little again.
    """
    made, read = vae.encoder.layers[-1], vae.decoder.layers[0]
    assert isinstance(made, nn.Conv2d)
    assert made.bias is not None
    assert isinstance(read, nn.Conv2d)
    made.weight.mul_(factors[:, None, None, None])
    made.bias.mul_(factors)
    read.weight.div_(factors[None, :, None, None])


@torch.no_grad()
def widen_latents(unet: UNet, latent_channels: int) -> UNet:
    """The U-Net for a widened VAE: what it knows of the first channels stays, the others begin at random.

    Weights that began as zeros took tens of thousands of samples to hand the new channels through.

    Raises:
        UserError: for fewer channels than `unet` has.
    """
    _check_wider(latent_channels, unet.config.in_channels, "U-Net")
    wide = build(unet.to_config() | {"in_channels": latent_channels, "out_channels": latent_channels})
    assert isinstance(wide, UNet)
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
