"""The autoencoders between pictures and latents: AutoencoderKL of Stable Diffusion, and the tiny TAESD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.kernels.convolution import Conv2d
from ldm.models.attention import ImageAttention
from ldm.models.config import (
    KL_FIXED,
    TINY_FIXED,
    TINY_IGNORED,
    KLConfig,
    TinyConfig,
    read_config,
    write_config,
)
from ldm.models.layers import Downsample, GroupNorm, ResnetBlock, Upsample


@dataclass(frozen=True, eq=False)
class LatentDist:
    """The diagonal Gaussian that an image encodes to: mean and standard deviation [B, c, h, w]."""

    mean: Tensor
    std: Tensor  # 0 where an autoencoder has no distribution

    def sample(self, noise: Tensor | torch.Generator | None = None) -> Tensor:
        """mean + std * noise, with unit noise of the same shape; drawn on the CPU where it is not given."""
        if not isinstance(noise, Tensor):
            noise = torch.randn(self.mean.shape, generator=noise)
        return self.mean + self.std * noise.to(self.mean)

    def scaled(self, vae: VAE) -> LatentDist:
        """The same, as the U-Net has latents: (z - shift) * scale."""
        return LatentDist((self.mean - vae.shift_factor) * vae.scaling_factor, self.std * vae.scaling_factor)

    @property
    def latent_dist(self) -> LatentDist:
        """Itself: diffusers' encoders give theirs inside an output."""
        return self

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    @property
    def logvar(self) -> Tensor:
        """log(std^2)."""
        return 2 * self.std.log()

    def kl(self) -> Tensor:
        """KL(N(mean, std^2) || N(0, 1)) summed over each image: [B] (Kingma & Welling 2014, appendix B)."""
        return 0.5 * (self.mean**2 + self.std**2 - 1 - self.logvar).sum(dim=(1, 2, 3))


class Decoded(NamedTuple):
    """What diffusers' decoders give: `.sample` and `[0]` are the images [B, 3, H, W], about [-1, 1]."""

    sample: Tensor


class _Middle(nn.Module):
    """Resnet, attention, resnet at the coarsest level: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([ImageAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class _Level(nn.Module):
    """Resnets, then a change of size: [B, C_in, H, W] -> [B, C_out, H', W']."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, groups=groups) for c in inputs)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """[B, 3, H, W] -> mean and log variance [B, 2 c, H / f, W / f]."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, wide in enumerate(channels):
            level = _Level(channels[max(i - 1, 0)], wide, config.layers_per_block, groups)
            if i < len(channels) - 1:
                level.downsamplers.append(Downsample(wide, padding=0))
            self.down_blocks.append(level)
        self.mid_block = _Middle(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x, silu=True))
        return out


class Decoder(nn.Module):
    """[B, c, h, w] -> [B, 3, f h, f w]."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _Middle(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for i, wide in enumerate(channels):
            level = _Level(channels[max(i - 1, 0)], wide, config.layers_per_block + 1, groups)
            if i < len(channels) - 1:
                level.upsamplers.append(Upsample(wide))
            self.up_blocks.append(level)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x, silu=True))
        return out


class AutoencoderKL(nn.Module):
    """The VAE of Stable Diffusion (Rombach et al. 2022, appendix G). Names as in diffusers' AutoencoderKL."""

    is_variational = True  # pictures encode to a distribution
    over_bands: bool | None = None  # `ldm.models.vae_bands`: always, never, or where memory is short
    budget: int | None = None  # bytes that it may take at most, where more are free

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.full_size_channels = max(config.block_out_channels[:2])  # of the widest features at H x W
        self.scaling_factor = config.scaling_factor
        self.shift_factor = config.shift_factor or 0.0
        self.force_upcast = config.force_upcast
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(c, c, 1) if config.use_post_quant_conv else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From diffusers' `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(KLConfig, config, KL_FIXED))

    def to_config(self) -> dict[str, Any]:
        """diffusers' `config.json`."""
        return write_config(self.config, "AutoencoderKL")

    def encode(self, images: Tensor) -> LatentDist:
        """[B, 3, H, W] in [-1, 1] -> the Gaussian over unscaled latents; logvar is clamped to [-30, 20]."""
        return self.distribution(self.encoder(images))

    def distribution(self, out: Tensor) -> LatentDist:
        """What the encoder's output [B, 2 c, h, w] says."""
        if self.quant_conv is not None:
            out = self.quant_conv(out)
        mean, logvar = out.chunk(2, dim=1)
        return LatentDist(mean, torch.exp(0.5 * logvar.clamp(-30, 20)))

    def encode_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(z - shift) * scale, with z a sample drawn with unit `noise` [B, c, h, w], or else the mean."""
        latents = self.encode(images)
        z = latents.mean if noise is None else latents.sample(noise)
        return (z - self.shift_factor) * self.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, c, h, w] -> images [B, 3, H, W], about [-1, 1], not clamped."""
        return self.decode(latents / self.scaling_factor + self.shift_factor).sample

    def decode(self, z: Tensor, return_dict: bool = True) -> Decoded:
        """Unscaled latents [B, c, h, w], as in diffusers; both values of `return_dict` give the same."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return Decoded(self.decoder(z))


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}


class TinyBlock(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]: relu(x + three convolutions)."""

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        conv1, conv2, conv3 = (Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(conv1, activation(), conv2, activation(), conv3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class _TinyEncoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> [B, c, H / f, W / f]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        wide, activation = config.encoder_block_out_channels[0], _ACTIVATIONS[config.act_fn]
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level == 0:
                layers.append(Conv2d(config.in_channels, wide, 3, padding=1))
            else:
                layers.append(Conv2d(wide, wide, 3, padding=1, stride=2, bias=False))
            layers += [TinyBlock(wide, activation) for _ in range(blocks)]
        layers.append(Conv2d(wide, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        # TAESD works in [0, 1].
        out: Tensor = self.layers((images + 1) / 2)
        return out


class _TinyDecoder(nn.Module):
    """[B, c, h, w] -> [B, 3, f h, f w], about [-1, 1]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        wide, activation = config.decoder_block_out_channels[0], _ACTIVATIONS[config.act_fn]
        layers: list[nn.Module] = [Conv2d(config.latent_channels, wide, 3, padding=1), activation()]
        last = len(config.num_decoder_blocks) - 1
        for level, blocks in enumerate(config.num_decoder_blocks):
            layers += [TinyBlock(wide, activation) for _ in range(blocks)]
            if level == last:
                layers.append(Conv2d(wide, config.out_channels, 3, padding=1))
            else:
                layers.append(nn.Upsample(scale_factor=config.upsampling_scaling_factor))
                layers.append(Conv2d(wide, wide, 3, padding=1, bias=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        # A soft clamp to +-3, where TAESD's latents live.
        out: Tensor = self.layers(torch.tanh(latents / 3) * 3)
        return out * 2 - 1


class AutoencoderTiny(nn.Module):
    """TAESD: a small deterministic autoencoder without norms. Names as in diffusers' AutoencoderTiny."""

    is_variational = False
    over_bands: bool | None = None  # `ldm.models.vae_bands`: always, never, or where memory is short
    budget: int | None = None  # bytes that it may take at most, where more are free

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.downscale = 2 ** (len(config.num_encoder_blocks) - 1)
        self.full_size_channels = config.decoder_block_out_channels[0]
        self.scaling_factor = config.scaling_factor
        self.shift_factor = config.shift_factor
        self.force_upcast = config.force_upcast
        self.encoder = _TinyEncoder(config)
        self.decoder = _TinyDecoder(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From diffusers' `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(TinyConfig, config, TINY_FIXED, TINY_IGNORED))

    def to_config(self) -> dict[str, Any]:
        """diffusers' `config.json`."""
        return write_config(self.config, "AutoencoderTiny")

    def encode(self, images: Tensor) -> LatentDist:
        """[B, 3, H, W] in [-1, 1] -> unscaled latents [B, c, h, w]: a mean, without deviation."""
        latents: Tensor = self.encoder(images)
        return LatentDist(latents, torch.zeros_like(latents))

    def encode_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(z - shift) * scale; `noise` is there for the common interface only, as nothing is random here."""
        return (self.encode(images).mean - self.shift_factor) * self.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, c, h, w] -> images [B, 3, H, W], about [-1, 1], not clamped."""
        return self.decode(latents / self.scaling_factor + self.shift_factor).sample

    def decode(self, z: Tensor, return_dict: bool = True) -> Decoded:
        """Unscaled latents [B, c, h, w], as in diffusers; both values of `return_dict` give the same."""
        return Decoded(self.decoder(z))


VAE = AutoencoderKL | AutoencoderTiny
