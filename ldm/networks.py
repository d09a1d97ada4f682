"""The networks' boundary: casts to their dtype and memory layout are here and nowhere else.

State is fp32 on this side. What holds NaN or Inf is made again in fp32, or refused (`ldm.runtime.finite`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.guidance import Predict
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet
from ldm.models.vae import Moments
from ldm.prediction import c_in
from ldm.runtime import finite
from ldm.schedule import Grid
from ldm.tasks import Encoded

VAE = AutoencoderKL | AutoencoderTiny


def predict(unet: UNet, grid: Grid, branches: Mapping[str, Conditioning]) -> Predict:
    """The U-Net's raw output, fp32, for the branches that a guidance asks for, in one call."""

    def call(x: Tensor, sigma: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        told = Conditioning.cat([branches[name] for name in names])
        sample = (x * c_in(sigma)).repeat(len(names), 1, 1, 1)
        timestep = float(grid.t(sigma))
        out = finite(unet, lambda unet: _unet(unet, sample, timestep, told), "the U-Net")
        return dict(zip(names, out.chunk(len(names)), strict=True))

    return call


def encode(vae: VAE, images: Tensor) -> Encoded:
    """Images [B, 3, H, W] in 0..1 -> the Gaussian over latents that the VAE makes of them, fp32."""
    moments = finite(vae, lambda vae: _encode(vae, images * 2 - 1), "the VAE's encoder")
    mean, std = moments.chunk(2, dim=1)
    return Encoded((mean - vae.shift_factor) * vae.scaling_factor, std * vae.scaling_factor)


def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Latents [B, c, h, w], as a VAE gives them -> images [B, 3, H, W] in 0..1, fp32."""
    images = finite(vae, lambda vae: _decode(vae, latents), "the VAE's decoder")
    return (images / 2 + 0.5).clamp(0, 1)


def _unet(unet: UNet, sample: Tensor, timestep: float, told: Conditioning) -> Tensor:
    """All that it is told is cast too, but for sizes and noise levels, which 16 bits cannot hold."""
    dtype = unet.conv_in.weight.dtype
    if told.concat is not None:
        sample = torch.cat([sample, told.concat], dim=1)
    out: Tensor = unet(
        sample.to(dtype, memory_format=torch.channels_last),
        timestep,
        told.tokens.to(dtype),
        pooled=None if told.pooled is None else told.pooled.to(dtype),
        time_ids=told.time_ids,
        class_labels=told.class_labels,
        timestep_cond=None if told.timestep_cond is None else told.timestep_cond.to(dtype),
    )
    return out


def _encode(vae: VAE, images: Tensor) -> Tensor:
    """Mean and standard deviation [B, 2 c, h, w], unscaled; the latter is 0 where a VAE has none."""
    weight = next(vae.parameters())
    latents = vae.encode(images.to(weight.device, weight.dtype, memory_format=torch.channels_last))
    both = (latents.mean, latents.std) if isinstance(latents, Moments) else (latents, 0 * latents)
    return torch.cat(both, dim=1)


def _decode(vae: VAE, latents: Tensor) -> Tensor:
    weight = next(vae.parameters())
    return vae.decode(latents.to(weight.device, weight.dtype, memory_format=torch.channels_last))
