"""AsymmetricAutoencoderKL: Stable Diffusion's latents with a larger decoder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from ldm.models.config import KLConfig, read_config, write_config
from ldm.models.vae import AutoencoderKL, Decoder

FIXED: dict[str, tuple[object, ...]] = {"act_fn": ("silu", "swish")}
IGNORED = frozenset({"block_out_channels"})  # diffusers writes it as a copy of up_block_out_channels


@dataclass(frozen=True)
class AsymmetricConfig:
    """Shape of an AsymmetricAutoencoderKL, with the names and defaults of diffusers' class.

    As in `KLConfig`, but that encoder ("down") and decoder ("up") have widths and depths of their own.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    down_block_out_channels: tuple[int, ...] = (64,)
    layers_per_down_block: int = 1
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    up_block_out_channels: tuple[int, ...] = (64,)
    layers_per_up_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = False

    def __post_init__(self) -> None:
        self.side("down")
        self.side("up")

    def side(self, name: str) -> KLConfig:
        """The autoencoder that has this one's encoder ("down") or its decoder ("up")."""
        return KLConfig(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            down_block_types=self.down_block_types,
            up_block_types=self.up_block_types,
            block_out_channels=getattr(self, f"{name}_block_out_channels"),
            layers_per_block=getattr(self, f"layers_per_{name}_block"),
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            sample_size=self.sample_size,
            scaling_factor=self.scaling_factor,
            force_upcast=self.force_upcast,
        )


class AsymmetricAutoencoderKL(AutoencoderKL):
    """Zhu et al. 2023, "Designing a Better Asymmetric VQGAN for StableDiffusion". Names as in diffusers.

    Decodes latents alone. `decoder.condition_encoder`, by which the decoder can also see an inpainted picture
    around its mask, is kept to be saved, and not used.
    """

    def __init__(self, config: AsymmetricConfig) -> None:
        super().__init__(config.side("down"))
        self.asymmetric = config
        self.full_size_channels = max(self.full_size_channels, *config.up_block_out_channels[:2])
        self.decoder = Decoder(config.side("up"))
        self.decoder.condition_encoder = _condition_encoder(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From diffusers' `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(AsymmetricConfig, config, FIXED, IGNORED))

    def to_config(self) -> dict[str, Any]:
        """diffusers' `config.json`."""
        return write_config(self.asymmetric, "AsymmetricAutoencoderKL")


def _condition_encoder(config: AsymmetricConfig) -> nn.Module:
    """diffusers' MaskConditionEncoder of stride 16: convolutions, twice as wide from one to the next."""
    wide, widest = config.up_block_out_channels[0], config.up_block_out_channels[-1]
    widths = [config.out_channels, *(min(wide * 2**k, widest) for k in range(4)), widest]
    encoder = nn.Module()
    encoder.layers = nn.Sequential(
        *(
            nn.Conv2d(before, after, 3, padding=1) if k < 2 else nn.Conv2d(before, after, 4, 2, padding=1)
            for k, (before, after) in enumerate(itertools.pairwise(widths))
        )
    )
    return encoder
