"""The half of a U-Net that goes down, and its middle: ControlNets are a copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.kernels.convolution import Conv2d
from ldm.models.attention import AnyText, Context, TextTimeEmbedding
from ldm.models.config import UNetConfig
from ldm.models.layers import TimeEmbedding, by_rows, timestep_features
from ldm.models.unet_blocks import DownBlock, down_blocks, mid_block


@dataclass(frozen=True, eq=False)
class Residuals:
    """What a network beside a U-Net adds to its features, [B, C, h, w] each, or [B, C, 1, 1] everywhere."""

    skips: tuple[Tensor, ...] = ()  # to what the way up takes of the way down, from the shallowest
    middle: Tensor | None = None  # to what leaves the middle
    within: tuple[Tensor, ...] = ()  # in the way down, to each level's features; one more is the middle's

    def added(self, skips: list[Tensor]) -> list[Tensor]:
        """What the way up takes: of all skips, or of the shallowest."""
        own = self.skips[: len(skips)]
        return [x + more for x, more in zip(skips, own, strict=True)] if own else skips


NO_RESIDUALS = Residuals()


class Encoder(nn.Module):
    """First convolution, embeddings of the time and of what is beside it, the levels down, the middle.

    Parameter names are those of diffusers' UNet2DConditionModel.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, kernel = config.block_out_channels, config.conv_in_kernel
        time_dim = config.time_dim
        self.conv_in = Conv2d(config.in_channels, channels[0], kernel, padding=(kernel - 1) // 2)
        self.time_embedding = TimeEmbedding(channels[0], time_dim, config.time_cond_proj_dim)
        self.class_embedding = _class_embedding(config, time_dim)
        self.add_embedding = _add_embedding(config, time_dim)
        self.down_blocks = nn.ModuleList(down_blocks(config, time_dim))
        self.mid_block = mid_block(config, time_dim)

    def _skips(
        self,
        x: Tensor,
        time: Tensor,
        context: AnyText,
        shares: Iterable[float],
        within: Sequence[Tensor] = (),
    ) -> Iterator[Tensor]:
        """What the way up wants of the way down, each computed when it is asked for."""
        yield x
        for k, (block, share) in enumerate(zip(self.down_blocks, shares, strict=True)):
            assert isinstance(block, DownBlock)
            for out in block.outputs(x, time, context, share, within[k] if k < len(within) else None):
                x = out
                yield x

    def _middle(
        self, x: Tensor, time: Tensor, context: AnyText, residuals: Residuals = NO_RESIDUALS
    ) -> Tensor:
        """What leaves the middle, which some distilled models leave out."""
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        for more in residuals.within[len(self.down_blocks) :]:
            x = x + more
        return x if residuals.middle is None else x + residuals.middle

    def _shares(self, merging: float) -> list[float]:
        """For each level the share of its tokens that is merged: `merging` at the finest that attends."""
        finest = next((k for k, block in enumerate(self.down_blocks) if block.attentions), None)
        return [merging if k == finest else 0.0 for k in range(len(self.down_blocks))]

    def _begin(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        context: AnyText,
        fields: Mapping[str, Tensor | None],
        more: Tensor | float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The first features, and the embedding of the time and of what is extra as all layers take it.

        `more` [B or 1, time_dim] is added to that.
        """
        extra = {name: value for name, value in fields.items() if value is not None}
        if extra.keys() != self.config.conditioning:
            raise ValueError(
                f"{type(self).__name__}: takes {sorted(self.config.conditioning)}, was given {sorted(extra)}"
            )
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        time = F.silu(self._embed(sample, timestep, context, extra) + more)
        return self.conv_in(sample), time

    def _embed(
        self, sample: Tensor, timestep: Tensor | float, context: AnyText, extra: Mapping[str, Tensor]
    ) -> Tensor:
        """[B, time_dim]: the sum of embeddings of the timestep and of all else that is extra; [1, time_dim]
        where it is the same for all rows.
        """
        config, dtype = self.config, sample.dtype
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        embedding: Tensor = self.time_embedding(self._features(t).to(dtype), extra.get("timestep_cond"))
        if self.class_embedding is not None:
            labels = extra["class_labels"]
            if config.class_embed_type is None:
                labels = labels.long()
            elif config.class_embed_type == "timestep":
                labels = self._features(labels).to(dtype)
            embedding = embedding + by_rows(self.class_embedding, labels)
        if self.add_embedding is not None:
            if config.addition_embed_type == "text_time":
                sizes = self._features(extra["time_ids"], config.addition_time_embed_dim).flatten(1)
                added = self.add_embedding(torch.cat([extra["pooled"], sizes.to(dtype)], dim=1))
            elif isinstance(context, Context):
                added = context.once(self.add_embedding, self.add_embedding)
            else:
                added = self.add_embedding(context)
            embedding = embedding + added
        return embedding

    def _features(self, t: Tensor, dim: int | None = None) -> Tensor:
        """[...] -> [..., dim] in fp32: angles reach 1000 radians, which 16 bits cannot hold."""
        config = self.config
        dim = dim or config.block_out_channels[0]
        return timestep_features(t, dim, config.flip_sin_to_cos, config.freq_shift)


def _class_embedding(config: UNetConfig, time_dim: int) -> nn.Module | None:
    """Of `class_labels`: a row of a table, or a projection of features that they are or are made into."""
    width = config.projection_class_embeddings_input_dim or 0
    match config.class_embed_type:
        case "timestep":
            return TimeEmbedding(config.block_out_channels[0], time_dim)
        case "projection":
            return TimeEmbedding(width, time_dim)
        case "simple_projection":
            return nn.Linear(width, time_dim)
        case "identity":
            return nn.Identity()
    return None if config.num_class_embeds is None else nn.Embedding(config.num_class_embeds, time_dim)


def _add_embedding(config: UNetConfig, time_dim: int) -> nn.Module | None:
    """Of pooled text: pooled here from the tokens ("text"), or by the text encoder, beside sizes (XL)."""
    if config.addition_embed_type == "text":
        width = config.per_level("cross_attention_dim")[0]
        return TextTimeEmbedding(width, time_dim, config.addition_embed_type_num_heads)
    width = config.projection_class_embeddings_input_dim or 0
    return TimeEmbedding(width, time_dim) if config.addition_embed_type == "text_time" else None
