"""ControlNet for several kinds of pictures at once (xinsir's ControlNet++, its union and ProMax models).

Each kind has a learned embedding; a small transformer mixes the means of all pictures' features and of the
latents', and gives each picture's features a bias of its own. Names are those of diffusers' class,
`transformer_layes` among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.models.attention import AnyText
from ldm.models.control.controlnet import ControlNet, ControlNetConfig
from ldm.models.encoder import Residuals
from ldm.models.layers import TimeEmbedding

# What published union models have been trained on, by number: ProMax has the last two.
TYPES = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "inpaint")
ALIASES = {
    "pose": "openpose",
    **dict.fromkeys(("hed", "pidi", "softedge", "ted", "sketch"), "scribble"),
    **dict.fromkeys(("lineart", "anime_lineart", "mlsd"), "canny"),
    "seg": "segment",
    "segmentation": "segment",
    "blur": "tile",
    "repaint": "inpaint",
}


@dataclass(frozen=True)
class ControlNetUnionConfig(ControlNetConfig):
    """Shape of a union ControlNet, with the names and defaults of diffusers' ControlNetUnionModel."""

    conditioning_embedding_out_channels: tuple[int, ...] = (48, 96, 192, 384)
    """As in a ControlNet."""
    num_control_type: int = 6
    """Kinds of pictures."""
    num_trans_channel: int = 320
    """Width of the transformer that mixes pictures: that of the finest level."""
    num_trans_head: int = 8
    """Its heads."""
    num_trans_layer: int = 1
    """Its layers."""
    num_proj_channel: int = 320
    """Width of the biases that it gives."""


class ControlNetUnion(ControlNet):
    """What pictures of several kinds add to a U-Net's features."""

    config: ControlNetUnionConfig
    class_name = "ControlNetUnionModel"
    config_class = ControlNetUnionConfig
    not_written = (*ControlNet.not_written, "mid_block_type")  # which always attends

    def __init__(self, config: ControlNetUnionConfig) -> None:
        super().__init__(config)
        width, kinds = config.num_trans_channel, config.num_control_type
        self.task_embedding = nn.Parameter(width**0.5 * torch.randn(kinds, width))
        self.transformer_layes = nn.ModuleList(
            MixingBlock(width, config.num_trans_head) for _ in range(config.num_trans_layer)
        )
        self.spatial_ch_projs = nn.Linear(width, config.num_proj_channel)
        for each in self.spatial_ch_projs.parameters():
            nn.init.zeros_(each)
        dim = config.addition_time_embed_dim or 0
        self.control_add_embedding = TimeEmbedding(dim * kinds, config.time_dim)

    def forward(  # type: ignore[override]  # pictures are several, each of a kind
        self,
        sample: Tensor,
        timestep: Tensor | float,
        context: AnyText,
        pictures: Sequence[Tensor] = (),
        kinds: Sequence[int] = (0,),
        *,
        scales: Sequence[float] | None = None,
        hints: Sequence[Tensor] | None = None,
        outputs: int | None = None,
        **extra: Tensor | None,
    ) -> Residuals:
        """As a ControlNet's, of pictures [B or 1, 3, H, W] each of one of the `kinds`, by number.

        `scales` are the strengths of several pictures; of a single one the caller scales the outputs.
        """
        hints = [self.hint(picture) for picture in pictures] if hints is None else hints
        scales = [1.0] * len(hints) if scales is None or len(hints) == 1 else scales
        rows = len(sample)
        x, time = self._begin(sample, timestep, context, extra, self._kinds(kinds, sample))
        hints = [
            each.expand(rows, *each.shape[1:]) * scale for each, scale in zip(hints, scales, strict=True)
        ]
        means = [
            hint.mean((2, 3)) + scale * self.task_embedding[kind]
            for hint, kind, scale in zip(hints, kinds, scales, strict=True)
        ]
        mixed = torch.stack([*means, x.mean((2, 3))], dim=1)
        for layer in self.transformer_layes:
            mixed = layer(mixed)
        for k, (hint, scale) in enumerate(zip(hints, scales, strict=True)):
            x = x + hint + scale * self.spatial_ch_projs(mixed[:, k])[:, :, None, None]
        return self._outputs(x, time, context, outputs)

    def _kinds(self, kinds: Sequence[int], sample: Tensor) -> Tensor:
        """[1, time_dim]: which kinds there are, as is added to the time's embedding."""
        there = torch.zeros(1, self.config.num_control_type, device=sample.device)
        there[:, list(kinds)] = 1
        features = self._features(there, self.config.addition_time_embed_dim).flatten(1)
        out: Tensor = self.control_add_embedding(features.to(sample.dtype))
        return out


class MixingBlock(nn.Module):
    """[B, N, dim] -> the same: a layer of CLIP's transformer.

    As it was trained, its attention goes along the batch, and not along N: of several pictures each would
    depend on the others. Here each attends to itself alone. That is what a picture by itself has there: its
    rows of guidance are alike, since no text has been read yet.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"ControlNetUnionModel config: num_trans_head = {heads} does not divide {dim}")
        self.attn = OwnValue(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)})
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        inner = self.mlp["c_fc"](self.ln_2(x))
        out: Tensor = x + self.mlp["c_proj"](inner * torch.sigmoid(1.702 * inner))
        return out


class OwnValue(nn.Module):
    """Attention of each token to itself alone, which is its value; names of nn.MultiheadAttention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        whole = nn.MultiheadAttention(dim, 1)
        self.in_proj_weight, self.in_proj_bias = whole.in_proj_weight, whole.in_proj_bias
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        out: Tensor = self.out_proj(F.linear(x, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :]))
        return out
