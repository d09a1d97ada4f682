"""The conditional U-Net of latent diffusion (Rombach et al. 2022), with diffusers' parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Self

from torch import Tensor, nn

from ldm.kernels.convolution import Conv2d
from ldm.models.attention import AnyText, Attention
from ldm.models.config import UNET_FIXED, UNetConfig, read_config, write_config
from ldm.models.encoder import NO_RESIDUALS, Encoder, Residuals
from ldm.models.layers import GroupNorm
from ldm.models.unet_blocks import UpBlock, up_blocks


class UNet(Encoder):
    """Predicts eps, v or x0 from noisy latents, the timestep and the text.

    Stable Diffusion 1, 2, XL and its refiner, inpainting, the x4 upscaler and LCM differ in `config` only: in
    widths, in where they attend, and in what they are extra beside the text.

    `state_dict` has exactly the names of diffusers' UNet2DConditionModel.
    """

    in_turn = False  # whether the branches of guidance are called one after another, in less memory

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        wide, kernel = config.block_out_channels[0], config.conv_out_kernel
        self.up_blocks = nn.ModuleList(up_blocks(config, config.time_dim))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, wide, config.norm_eps)
        self.conv_out = Conv2d(wide, config.out_channels, kernel, padding=(kernel - 1) // 2)
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
        residuals: Residuals = NO_RESIDUALS,
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
            residuals: of networks beside this one.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: if what is given beside the text is not what `config.conditioning` names.
        """
        extra = {"pooled": pooled, "time_ids": time_ids, "class_labels": class_labels}
        x, time = self._begin(sample, timestep, context, extra | {"timestep_cond": timestep_cond})
        skips = list(self._skips(x, time, context, self._shares(merging), residuals.within))
        x = self._middle(skips[-1], time, context, residuals)
        skips = residuals.added(skips)
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
        residuals: Residuals = NO_RESIDUALS,
        **extra: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the deep features that the layer of that `branch`, 0 to `num_skips` - 1, was given.

        With `deep`, those of another call, only what lies above them is computed: the first ``branch + 1``
        outputs of the way down and the layers of the way up that take those. Ma et al. 2024, "DeepCache",
        equations 2 to 4, whose branches count like these.
        """
        x, time = self._begin(sample, timestep, context, extra)
        shares = self._shares(merging)
        every = self._skips(x, time, context, shares, residuals.within)
        skips = list(islice(every, None if deep is None else branch + 1))
        x = self._middle(skips[-1], time, context, residuals) if deep is None else deep
        skips = residuals.added(skips)
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

    def _end(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.conv_norm_out(x, silu=True))
        return out
