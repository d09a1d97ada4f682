"""The levels of the U-Net, and how a config says what each holds; parameter names are diffusers'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ldm.models.attention import AnyText, Context, SpatialTransformer
from ldm.models.config import UNetConfig
from ldm.models.layers import Downsample, ResnetBlock, Upsample


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

    def outputs(
        self, x: Tensor, time: Tensor, context: AnyText, merging: float = 0.0, more: Tensor | None = None
    ) -> Iterator[Tensor]:
        """All that the way up will want, each computed when it is asked for; the last of them goes on.

        `more` is added where this level's features are ready: before they are halved where the level attends,
        else after, as T2I-Adapters were trained.
        """
        layers = len(self.resnets)
        ready = layers - 1 if self.attentions else layers - 1 + len(self.downsamplers)
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context, merging)
            x = x if more is None or i != ready else x + more
            yield x
        for downsample in self.downsamplers:
            x = downsample(x)
            yield x if more is None or ready != layers else x + more


class MidBlock(nn.Module):
    """The coarsest level: a resnet, then transformer and resnet, which some distilled models leave out."""

    def __init__(self, resnets: Iterable[ResnetBlock], attentions: Iterable[SpatialTransformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, time: Tensor, context: AnyText) -> Tensor:
        x = self.resnets[0](x, time)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context), time)
        return x


class UpBlock(nn.Module):
    """One level on the way up: each resnet takes one output of the way down beside its input."""

    level = 0  # from the deepest

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

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, context: AnyText, merging: float = 0.0
    ) -> Tensor:
        """Pops what it takes from `skips`. Enlarges to the size of the next one, which may be odd."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x, skips, time, context, merging)
        return x

    def layer(
        self,
        i: int,
        x: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: AnyText,
        merging: float = 0.0,
    ) -> Tensor:
        """The i-th resnet with its transformer; the last enlarges too."""
        skip = skips.pop()
        if isinstance(context, Context) and context.meet is not None:
            x, skip = context.meet(self.level, x, skip)
        x = self.resnets[i](torch.cat([x, skip], dim=1), time)
        if self.attentions:
            x = self.attentions[i](x, context, merging)
        if i == len(self.resnets) - 1:
            for upsample in self.upsamplers:
                x = upsample(x, skips[-1].shape[2:])
        return x


def _resnet(config: UNetConfig, time_dim: int, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, time_dim, config.norm_num_groups, config.norm_eps)


def _transformers(
    config: UNetConfig, level: int, depths: Iterable[int], only_cross: bool
) -> list[SpatialTransformer]:
    """One transformer for each of `depths`, its number of blocks."""
    return [
        SpatialTransformer(
            config.block_out_channels[level],
            config.per_level("cross_attention_dim")[level],
            config.per_level("attention_head_dim")[level],
            depth,
            config.norm_num_groups,
            config.use_linear_projection,
            only_cross,
        )
        for depth in depths
    ]


def down_blocks(config: UNetConfig, time_dim: int) -> Iterable[DownBlock]:
    channels, layers = config.block_out_channels, config.per_level("layers_per_block")
    depths, only_cross = config.depths(), config.per_level("only_cross_attention")
    for level, kind in enumerate(config.down_block_types):
        wide, last = channels[level], level == len(channels) - 1
        inputs = [channels[max(level - 1, 0)]] + [wide] * (layers[level] - 1)
        attends = kind == "CrossAttnDownBlock2D"
        yield DownBlock(
            [_resnet(config, time_dim, c, wide) for c in inputs],
            _transformers(config, level, depths[level] if attends else (), only_cross[level]),
            None if last else Downsample(wide, config.downsample_padding),
        )


def mid_block(config: UNetConfig, time_dim: int) -> MidBlock | None:
    if config.mid_block_type is None:  # in some distilled models
        return None
    wide, attends = config.block_out_channels[-1], config.mid_block_type == "UNetMidBlock2DCrossAttn"
    resnets = [_resnet(config, time_dim, wide, wide) for _ in range(1 + attends)]
    for resnet in resnets:
        resnet.scale = config.mid_block_scale_factor
    depths = config.depths()[-1][:1] if attends else ()
    return MidBlock(resnets, _transformers(config, -1, depths, only_cross=False))


def up_blocks(config: UNetConfig, time_dim: int) -> Iterable[UpBlock]:
    channels, layers = config.block_out_channels, config.per_level("layers_per_block")
    depths, only_cross = config.depths(up=True), config.per_level("only_cross_attention")
    for level, kind in zip(reversed(range(len(channels))), config.up_block_types, strict=True):
        wide, below = channels[level], channels[min(level + 1, len(channels) - 1)]
        # The last skip of a level comes from the level above it: the output of its downsampling.
        inputs = [below] + [wide] * layers[level]
        skips = [wide] * layers[level] + [channels[max(level - 1, 0)]]
        attends = kind == "CrossAttnUpBlock2D"
        block = UpBlock(
            [_resnet(config, time_dim, c + s, wide) for c, s in zip(inputs, skips, strict=True)],
            _transformers(config, level, depths[level] if attends else (), only_cross[level]),
            Upsample(wide) if level else None,
        )
        block.level = len(channels) - 1 - level
        yield block
