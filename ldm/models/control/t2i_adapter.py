"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): a small network of a picture alone, once for all steps.

It gives features for each level of a U-Net's way down. Names are those of diffusers' T2IAdapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.kernels.convolution import Conv2d
from ldm.models.config import read_config, write_config

TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True)
class T2IAdapterConfig:
    """Shape of a T2I-Adapter, with the names and defaults of diffusers' class."""

    in_channels: int = 3
    """Channels of the picture: 1 is grey."""
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Of the features of each level."""
    num_res_blocks: int = 2
    """Residual blocks of each level."""
    downscale_factor: int = 8
    """Pixels a side that become the channels of one place."""
    adapter_type: str = "full_adapter"
    """full_adapter, full_adapter_xl (one of whose levels alone halves the size), or light_adapter."""

    def __post_init__(self) -> None:
        if self.adapter_type not in TYPES:
            raise UserError(
                f"T2IAdapter config: adapter_type = {self.adapter_type!r} is not supported, only "
                + " or ".join(map(repr, TYPES))
            )

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of what it gives, level by level."""
        return (*self.channels, *self.channels[-1:] * (self.adapter_type == "light_adapter"))


class T2IAdapter(nn.Module):
    """Pictures [B, C, H, W] in 0..1 -> features [B, channels[k], h_k, w_k] for each level of a U-Net."""

    class_name = "T2IAdapter"

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = _Adapter(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From diffusers' `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(T2IAdapterConfig, config, {}))

    def to_config(self) -> dict[str, Any]:
        """diffusers' `config.json`."""
        return write_config(self.config, self.class_name)

    def forward(self, picture: Tensor) -> list[Tensor]:
        x = F.pixel_unshuffle(picture, self.config.downscale_factor)
        if hasattr(self.adapter, "conv_in"):
            x = self.adapter.conv_in(x)
        features = []
        for level in self.adapter.body:
            x = level(x)
            features.append(x)
        return features


class _Adapter(nn.Module):
    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        wide, kind = config.channels, config.adapter_type
        channels = config.in_channels * config.downscale_factor**2
        if kind == "light_adapter":
            inputs = [channels, *wide]
            levels = [
                _Level(c, out, config.num_res_blocks, k > 0, light=True)
                for k, (c, out) in enumerate(zip(inputs, config.features, strict=True))
            ]
        else:
            self.conv_in = Conv2d(channels, wide[0], 3, padding=1)
            is_xl = kind == "full_adapter_xl"
            inputs = [wide[0], *wide[:-1]]
            if is_xl:  # as diffusers has it: the levels after the third do not change width
                inputs = [wide[k - 1] if k in (1, 2) else wide[k] for k in range(len(wide))]
            levels = [
                _Level(c, out, config.num_res_blocks, k == 2 if is_xl else k > 0)
                for k, (c, out) in enumerate(zip(inputs, wide, strict=True))
            ]
        self.body = nn.ModuleList(levels)


class _Level(nn.Module):
    """Half size where it goes `down`, another width, residual blocks; in light ones of a quarter of that."""

    def __init__(self, channels: int, out: int, blocks: int, down: bool, light: bool = False) -> None:
        super().__init__()
        self.down, inner = down, out // 4 if light else out
        self.in_conv = Conv2d(channels, inner, 1) if light or channels != out else None
        self.resnets = nn.Sequential(*(_Resnet(inner, 3 if light else 1) for _ in range(blocks)))
        self.out_conv = Conv2d(inner, out, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True)
        if self.in_conv is not None:
            x = self.in_conv(x)
        x = self.resnets(x)
        return x if self.out_conv is None else self.out_conv(x)


class _Resnet(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = Conv2d(channels, channels, 3, padding=1)
        self.block2 = Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block2(torch.relu(self.block1(x)))
        return out
