"""ControlNet (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"), section 3.

A copy of a U-Net's way down and middle, which sees a picture beside the latents; each of its features goes
through a 1 x 1 convolution, which begins at zero, and is added to the U-Net's own. Names are diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import islice, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.kernels.convolution import Conv2d
from ldm.models.attention import AnyText
from ldm.models.config import UNET_FIXED, UNetConfig, read_config, write_config
from ldm.models.encoder import Encoder, Residuals

# Of a U-Net's config what diffusers' ControlNets have not: each is what it is by default.
_OF_UNETS = (
    "sample_size",
    "out_channels",
    "center_input_sample",
    "up_block_types",
    "reverse_transformer_layers_per_block",
    "time_embedding_dim",
    "time_cond_proj_dim",
    "conv_in_kernel",
    "conv_out_kernel",
)


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """Shape of a ControlNet, with the names and defaults of diffusers' ControlNetModel."""

    conditioning_channels: int = 3
    """Channels of the picture."""
    controlnet_conditioning_channel_order: str = "rgb"
    """Of the picture: rgb or bgr."""
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    """Widths of the convolutions that shrink the picture to latents' size: each but the first halves it."""
    global_pool_conditions: bool = False
    """Outputs are averaged over all places (shuffle)."""

    def __post_init__(self) -> None:
        # Its length is checked as that of all that is given level by level.
        up = tuple(kind.replace("Down", "Up") for kind in reversed(self.down_block_types))
        object.__setattr__(self, "up_block_types", up)
        super().__post_init__()

    @classmethod
    def of(cls, unet: UNetConfig, **changes: Any) -> Self:
        """Of a ControlNet for a U-Net; `changes` are fields that no U-Net has."""
        own = {each.name: getattr(unet, each.name) for each in fields(UNetConfig)}
        return cls(**{name: value for name, value in own.items() if name not in _OF_UNETS}, **changes)

    @property
    def skip_channels(self) -> list[int]:
        """Of each output for the way up, from the shallowest."""
        return skip_channels(self)


def skip_channels(config: UNetConfig) -> list[int]:
    """Channels of what the way up takes of the way down, from the shallowest."""
    wide, found = config.block_out_channels, [config.block_out_channels[0]]
    for level, layers in enumerate(config.per_level("layers_per_block")):
        found += [wide[level]] * (layers + (level < len(wide) - 1))
    return found


class PictureEmbedding(nn.Module):
    """[B, 3, H, W] pictures in 0..1 -> [B, channels, H / 8, W / 8]; the last convolution begins at zero."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(widths):
            self.blocks.append(Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = zeroed(Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        out: Tensor = self.conv_out(x)
        return out


class ControlNet(Encoder):
    """What a picture adds to a U-Net's features. `state_dict` has the names of diffusers' ControlNetModel."""

    config: ControlNetConfig
    class_name = "ControlNetModel"
    config_class: type[ControlNetConfig] = ControlNetConfig
    not_written: tuple[str, ...] = _OF_UNETS

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        wide = config.block_out_channels
        self.controlnet_cond_embedding = PictureEmbedding(
            config.conditioning_channels, config.conditioning_embedding_out_channels, wide[0]
        )
        self.controlnet_down_blocks = nn.ModuleList(zeroed(Conv2d(c, c, 1)) for c in config.skip_channels)
        self.controlnet_mid_block = zeroed(Conv2d(wide[-1], wide[-1], 1))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From diffusers' `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(cls.config_class, config, UNET_FIXED))

    def to_config(self) -> dict[str, Any]:
        """diffusers' `config.json`."""
        return self.written(self.config)

    @classmethod
    def written(cls, config: ControlNetConfig) -> dict[str, Any]:
        """A config as diffusers' `config.json`."""
        values = write_config(config, cls.class_name)
        return {key: value for key, value in values.items() if key not in cls.not_written}

    @classmethod
    def from_unet(cls, unet: Encoder, **changes: Any) -> Self:
        """One to be trained: the U-Net's weights, copied, and outputs of zero.

        Args:
            changes: fields of its config that no U-Net has, such as conditioning_channels=1.
        """
        made = cls(cls.config_class.of(unet.config, **changes))
        weight = unet.conv_in.weight
        made.to(weight.device, weight.dtype)
        beside = {name: t for name, t in made.state_dict().items() if name.startswith("controlnet_")}
        ours = made.state_dict().keys()
        copied = {name: t for name, t in unet.state_dict().items() if name in ours}
        made.load_state_dict(copied | beside, strict=True)
        return made

    def hint(self, picture: Tensor) -> Tensor:
        """A picture [B, 3, H, W] in 0..1 (-1 where it is to be filled) as features [B, C, h, w].

        The same in all steps of a drawing: given to `forward`, it is made but once.
        """
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture.flip(1)
        out: Tensor = self.controlnet_cond_embedding(picture)
        return out

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        context: AnyText,
        picture: Tensor | None = None,
        *,
        hint: Tensor | None = None,
        outputs: int | None = None,
        **extra: Tensor | None,
    ) -> Residuals:
        """What is to be added to a U-Net's features; everything as `UNet.forward` takes it.

        Args:
            picture: [B or 1, 3, H, W], or in its place
            hint: what `hint` has made of it.
            outputs: the shallowest only, and no middle: so many.

        Raises:
            ValueError: if what is given beside the text is not what `config.conditioning` names.
        """
        x, time = self._begin(sample, timestep, context, extra)
        if hint is None:
            assert picture is not None
            hint = self.hint(picture)
        return self._outputs(x + hint, time, context, outputs)

    def _outputs(self, x: Tensor, time: Tensor, context: AnyText, outputs: int | None) -> Residuals:
        shares = [0.0] * len(self.down_blocks)
        skips = list(islice(self._skips(x, time, context, shares), outputs))
        made = [out(skip) for out, skip in zip(self.controlnet_down_blocks, skips, strict=outputs is None)]
        if outputs is None:
            made.append(self.controlnet_mid_block(self._middle(skips[-1], time, context)))
        if self.config.global_pool_conditions:
            made = [each.mean((2, 3), keepdim=True) for each in made]
        return Residuals(tuple(made)) if outputs is not None else Residuals(tuple(made[:-1]), made[-1])


def guess_weights(skips: int) -> list[float]:
    """Of each of `skips` outputs and of the middle's in guess mode: 0.1 to 1, by equal factors."""
    return [float(w) for w in torch.logspace(-1, 0, skips + 1)]


def zeroed(layer: Conv2d) -> Conv2d:
    """A convolution whose output is zero, until it is trained."""
    for each in layer.parameters():
        nn.init.zeros_(each)
    return layer
