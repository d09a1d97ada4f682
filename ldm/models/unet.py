"""The conditional U-Net of latent diffusion (Rombach et al. 2022), with diffusers' parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.attention import AnyText, Attention, Context, TextTimeEmbedding
from ldm.models.config import UNET_FIXED, UNetConfig, read_config, write_config
from ldm.models.convolution import Conv2d
from ldm.models.layers import GroupNorm, TimeEmbedding, timestep_features
from ldm.models.unet_blocks import DownBlock, UpBlock, down_blocks, mid_block, up_blocks


class UNet(nn.Module):
    """Predicts eps, v or x0 from noisy latents, the timestep and the text.

    Stable Diffusion 1, 2, XL and its refiner, inpainting, the x4 upscaler and LCM differ in `config` only: in
    widths, in where they attend, and in what they are extra beside the text.

    `state_dict` has exactly the names of diffusers' UNet2DConditionModel.
    """

    in_turn = False  # whether the branches of guidance are called one after another, in less memory

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        time_dim = config.time_embedding_dim or 4 * channels[0]
        kernel_in, kernel_out = config.conv_in_kernel, config.conv_out_kernel

        self.conv_in = Conv2d(config.in_channels, channels[0], kernel_in, padding=(kernel_in - 1) // 2)
        self.time_embedding = TimeEmbedding(channels[0], time_dim, config.time_cond_proj_dim)
        self.class_embedding = _class_embedding(config, time_dim)
        self.add_embedding = _add_embedding(config, time_dim)
        self.down_blocks = nn.ModuleList(down_blocks(config, time_dim))
        self.mid_block = mid_block(config, time_dim)
        self.up_blocks = nn.ModuleList(up_blocks(config, time_dim))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, kernel_out, padding=(kernel_out - 1) // 2)
        for name, layer in self.named_modules():
            if isinstance(layer, Attention):
                layer.name = name

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From diffusers' `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(UNetConfig, config, UNET_FIXED))

    def to_config(self) -> dict[str, Any]:
        """diffusers' `config.json`."""
        return write_config(self.config, "UNet2DConditionModel")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        context: AnyText,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        merging: float = 0.0,
    ) -> Tensor:
        """The raw prediction: eps, v or x0, as the model was trained.

        All but `class_labels` and `time_ids`, which 16 bits cannot hold, come in the dtype of the weights.

        Args:
            sample: [B, in_channels, H, W] latents in VP scale, x / sqrt(sigma^2 + 1), then the channels that
                some models see beside them (mask, picture); any H and W.
            timestep: [B] or a number, in training steps; fractions allowed.
            context: [B, N, cross_attention_dim] text embedding; keys and values of a `Context` are made once.
            pooled: [B, P] pooled text embedding (XL).
            time_ids: [B, 6] sizes and crops in pixels (XL), or [B, 5] with an aesthetic score (refiner).
            class_labels: [B] noise level of the low-resolution picture (x4 upscaler).
            timestep_cond: [B, time_cond_proj_dim] embedded guidance scale (LCM).
            merging: share of the tokens that self-attention merges (`ldm.models.merging`) at the finest level
                that attends, where they are the most.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: if what is given beside the text is not what `config.conditioning` names.
        """
        extra = {"pooled": pooled, "time_ids": time_ids, "class_labels": class_labels}
        x, time = self._begin(sample, timestep, context, extra | {"timestep_cond": timestep_cond})
        skips = [x]
        for block, share in zip(self.down_blocks, self._shares(merging), strict=True):
            skips += block(skips[-1], time, context, share)
        x = skips[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        for block, share in zip(self.up_blocks, self._shares(merging)[::-1], strict=True):
            x = block(x, skips, time, context, share)
        return self._end(x)

    @property
    def num_skips(self) -> int:
        """How many layers of the way up take an output of the way down: the shallowest, the last, is 0."""
        return sum(len(block.resnets) for block in self._ups())

    def _ups(self) -> list[UpBlock]:
        return [block for block in self.up_blocks if isinstance(block, UpBlock)]

    def from_deep(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        context: AnyText,
        branch: int,
        deep: Tensor | None = None,
        merging: float = 0.0,
        **extra: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the deep features that the layer of that `branch`, 0 to `num_skips` - 1, was given.

        With `deep`, those of another call, only what lies above them is computed: the first ``branch + 1``
        outputs of the way down and the layers of the way up that take those. Ma et al. 2024, "DeepCache",
        equations 2 to 4, whose branches count like these.
        """
        x, time = self._begin(sample, timestep, context, extra)
        shares = self._shares(merging)
        skips = list(islice(self._skips(x, time, context, shares), None if deep is None else branch + 1))
        x = skips[-1] if deep is None else deep
        if self.mid_block is not None and deep is None:
            x = self.mid_block(x, time, context)
        layers = [
            (block, i, share)
            for block, share in zip(self._ups(), shares[::-1], strict=True)
            for i in range(len(block.resnets))
        ]
        for block, i, share in layers[-len(skips) :]:
            if len(skips) == branch + 1:
                deep = x
            x = block.layer(i, x, skips, time, context, share)
        assert deep is not None
        return self._end(x), deep

    def _skips(self, x: Tensor, time: Tensor, context: AnyText, shares: Iterable[float]) -> Iterator[Tensor]:
        """What the way up wants of the way down, each computed when it is asked for."""
        yield x
        for block, share in zip(self.down_blocks, shares, strict=True):
            assert isinstance(block, DownBlock)
            for out in block.outputs(x, time, context, share):
                x = out
                yield x

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
    ) -> tuple[Tensor, Tensor]:
        """The first features, and the embedding of the time and of what is extra as all layers take it."""
        extra = {name: value for name, value in fields.items() if value is not None}
        if extra.keys() != self.config.conditioning:
            raise ValueError(f"U-Net: takes {sorted(self.config.conditioning)}, was given {sorted(extra)}")
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        time = F.silu(self._embed(sample, timestep, context, extra))
        return self.conv_in(sample), time

    def _end(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.conv_norm_out(x, silu=True))
        return out

    def _embed(
        self, sample: Tensor, timestep: Tensor | float, context: AnyText, extra: Mapping[str, Tensor]
    ) -> Tensor:
        """[B, time_dim]: the sum of embeddings of the timestep and of all else that it is extra."""
        config, dtype = self.config, sample.dtype
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(sample.shape[0])
        embedding: Tensor = self.time_embedding(self._features(t).to(dtype), extra.get("timestep_cond"))
        if self.class_embedding is not None:
            labels = extra["class_labels"]
            if config.class_embed_type is None:
                labels = labels.long()
            elif config.class_embed_type == "timestep":
                labels = self._features(labels).to(dtype)
            embedding = embedding + self.class_embedding(labels)
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
