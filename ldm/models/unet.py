"""The conditional U-Net of latent diffusion (Rombach et al. 2022), with diffusers' parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.attention import SpatialTransformer, TextTimeEmbedding
from ldm.models.config import UNET_FIXED, UNetConfig, read_config, write_config
from ldm.models.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    timestep_features,
)


class DownBlock(nn.Module):
    """One level on the way down: resnets, each with a transformer where the level attends, then half size."""

    def __init__(
        self,
        resnets: Iterable[ResnetBlock],
        attentions: Iterable[SpatialTransformer],
        downsample: Downsample | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsample] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """All outputs that the way up will want; the last of them goes on."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            outputs.append(x)
        for downsample in self.downsamplers:
            outputs.append(downsample(x))
        return outputs


class MidBlock(nn.Module):
    """The coarsest level: resnet, transformer, resnet."""

    def __init__(self, resnets: Iterable[ResnetBlock], attention: SpatialTransformer) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        out: Tensor = self.resnets[1](x, time)
        return out


class UpBlock(nn.Module):
    """One level on the way up: each resnet takes one output of the way down beside its input."""

    def __init__(
        self,
        resnets: Iterable[ResnetBlock],
        attentions: Iterable[SpatialTransformer],
        upsample: Upsample | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([upsample] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        """Pops what it takes from `skips`. Enlarges to the size of the next one, which may be odd."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Predicts eps, v or x0 from noisy latents, the timestep and the text.

    `state_dict` has exactly the names of diffusers' UNet2DConditionModel.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        time_dim = config.time_embedding_dim or 4 * channels[0]
        kernel_in, kernel_out = config.conv_in_kernel, config.conv_out_kernel

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], kernel_in, padding=(kernel_in - 1) // 2)
        self.time_embedding = TimeEmbedding(channels[0], time_dim)
        self.add_embedding: TextTimeEmbedding | None = None
        if config.addition_embed_type == "text":
            text_dim = config.per_level("cross_attention_dim")[0]
            self.add_embedding = TextTimeEmbedding(text_dim, time_dim, config.addition_embed_type_num_heads)
        self.down_blocks = nn.ModuleList(_down_blocks(config, time_dim))
        self.mid_block = _mid_block(config, time_dim)
        self.up_blocks = nn.ModuleList(_up_blocks(config, time_dim))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, kernel_out, padding=(kernel_out - 1) // 2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From diffusers' `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(UNetConfig, config, UNET_FIXED))

    def to_config(self) -> dict[str, Any]:
        """diffusers' `config.json`."""
        return write_config(self.config, "UNet2DConditionModel")

    def forward(self, sample: Tensor, timestep: Tensor | float, context: Tensor) -> Tensor:
        """The raw prediction: eps, v or x0, as the model was trained.

        Args:
            sample: [B, in_channels, H, W] latents in VP scale, x / sqrt(sigma^2 + 1); any H and W.
            timestep: [B] or a number, in training steps; fractions allowed.
            context: [B, N, cross_attention_dim] text embedding.

        Returns:
            [B, out_channels, H, W].
        """
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        time = F.silu(self._embed(sample, timestep, context))
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context)
        x = self.mid_block(skips[-1], time, context)
        for block in self.up_blocks:
            x = block(x, skips, time, context)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out

    def _embed(self, sample: Tensor, timestep: Tensor | float, context: Tensor) -> Tensor:
        """[B, time_dim] embedding of the timestep and, where the config says so, of the pooled text."""
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(sample.shape[0])
        config = self.config
        # Angles reach 1000 radians, which 16 bits cannot hold: cast only the features.
        features = timestep_features(
            t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        embedding: Tensor = self.time_embedding(features.to(sample.dtype))
        if self.add_embedding is not None:
            embedding = embedding + self.add_embedding(context)
        return embedding


def _resnet(config: UNetConfig, time_dim: int, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, time_dim, config.norm_num_groups, config.norm_eps)


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.per_level("cross_attention_dim")[level],
        config.per_level("attention_head_dim")[level],
        config.per_level("transformer_layers_per_block")[level],
        config.norm_num_groups,
        config.use_linear_projection,
    )


def _down_blocks(config: UNetConfig, time_dim: int) -> Iterable[DownBlock]:
    channels, layers = config.block_out_channels, config.per_level("layers_per_block")
    for level, kind in enumerate(config.down_block_types):
        wide, last = channels[level], level == len(channels) - 1
        inputs = [channels[max(level - 1, 0)]] + [wide] * (layers[level] - 1)
        attends = kind == "CrossAttnDownBlock2D"
        yield DownBlock(
            [_resnet(config, time_dim, c, wide) for c in inputs],
            [_transformer(config, level) for _ in inputs if attends],
            None if last else Downsample(wide, config.downsample_padding),
        )


def _mid_block(config: UNetConfig, time_dim: int) -> MidBlock:
    wide = config.block_out_channels[-1]
    resnets = [_resnet(config, time_dim, wide, wide) for _ in range(2)]
    for resnet in resnets:
        resnet.scale = config.mid_block_scale_factor
    return MidBlock(resnets, _transformer(config, -1))


def _up_blocks(config: UNetConfig, time_dim: int) -> Iterable[UpBlock]:
    channels, layers = config.block_out_channels, config.per_level("layers_per_block")
    for level, kind in zip(reversed(range(len(channels))), config.up_block_types, strict=True):
        wide, below = channels[level], channels[min(level + 1, len(channels) - 1)]
        # The last skip of a level comes from the level above it: the output of its downsampling.
        inputs = [below] + [wide] * layers[level]
        skips = [wide] * layers[level] + [channels[max(level - 1, 0)]]
        attends = kind == "CrossAttnUpBlock2D"
        yield UpBlock(
            [_resnet(config, time_dim, c + s, wide) for c, s in zip(inputs, skips, strict=True)],
            [_transformer(config, level) for _ in inputs if attends],
            Upsample(wide) if level else None,
        )
