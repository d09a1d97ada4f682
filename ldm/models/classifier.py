"""A classifier of noisy latents, for classifier guidance (Dhariwal and Nichol 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.kernels.convolution import Conv2d
from ldm.models.config import read_config, write_config
from ldm.models.layers import Downsample, GroupNorm, ResnetBlock, TimeEmbedding, timestep_features
from ldm.models.vae import VAE

CLASS_NAME = "LatentClassifier"
SAME = 0.01  # relative: what dtypes make of a norm differs by less, and what two trainings do by more


@dataclass(frozen=True)
class ClassifierConfig:
    """Which classes of whose latents a classifier tells apart, and its widths."""

    classes: tuple[str, ...]
    """Their names, in the order of the logits."""
    vae: tuple[float, ...]
    """`fingerprint` of the VAE whose latents it knows."""
    in_channels: int = 4
    """Channels of the latents."""
    block_out_channels: tuple[int, ...] = (32, 40, 56)
    """Channels of each level, from the finest."""
    norm_num_groups: int = 8
    """Groups of every GroupNorm."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len({*self.classes}) < len(self.classes):
            raise UserError("classifier config: classes must be at least two names, each once")
        if self.norm_num_groups < 1 or any(c % self.norm_num_groups for c in self.block_out_channels):
            raise UserError(
                f"classifier config: norm_num_groups = {self.norm_num_groups} does not divide "
                f"block_out_channels {list(self.block_out_channels)}"
            )


class LatentClassifier(nn.Module):
    """Logits of ``p(class | x, sigma)`` for noisy latents ``x = x0 + sigma * noise``, at any noise level.

    What it sees is ``u = x / (1 + sigma^2)``, the best linear guess of x0 for latents of unit variance. Its
    gradient in x is ``1 / (1 + sigma^2)`` times that in u, so ``sigma^2`` times it, by which guidance moves
    x0, is finite at every sigma, as it is for the exact classifier: at pure noise x0 moves from the mean of
    all pictures to the mean of the class. The noise level is told as the angle ``atan(sigma)``, so that no
    schedule need be known: one classifier serves every model on the same VAE.

    Each level is a resnet at half the size of the one before; each class has its own attention pooling.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_dim, groups = 2 * widths[0], config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_dim)
        befores = (widths[0], *widths[:-1])
        self.resnets = nn.ModuleList(
            ResnetBlock(*pair, time_dim, groups) for pair in zip(befores, widths, strict=True)
        )
        self.downsamplers = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.norm_out = GroupNorm(groups, widths[-1])
        self.pool = nn.Linear(widths[-1], len(config.classes))
        self.classes = nn.Linear(widths[-1], len(config.classes))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a `config.json`. Raises UserError naming a key or value that is not supported."""
        return cls(read_config(ClassifierConfig, config, {}))

    def to_config(self) -> dict[str, Any]:
        """What a `config.json` says."""
        return write_config(self.config, CLASS_NAME)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits [B, classes].

        Args:
            x: [B, C, H, W] in sigma space, any H and W.
            sigma: a scalar, or [B].
        """
        sigma = sigma.expand(len(x))
        u = x * (1 / (1 + sigma**2)).to(x)[:, None, None, None]
        angle = sigma.atan() * (2000 / math.pi)  # 0 to 1000, as timesteps are
        features = timestep_features(angle.to(x.device), self.config.block_out_channels[0])
        time = F.silu(self.time_embedding(features.to(x.dtype)))
        h = self.conv_in(u)
        for i, resnet in enumerate(self.resnets):
            h = resnet(self.downsamplers[i - 1](h) if i else h, time)
        tokens = F.silu(self.norm_out(h)).flatten(2).transpose(1, 2)  # [B, N, D]
        pooled = self.pool(tokens).softmax(1).transpose(1, 2) @ tokens  # [B, classes, D]
        logits: Tensor = (pooled * self.classes.weight).sum(2) + self.classes.bias
        return logits


def fingerprint(vae: VAE) -> tuple[float, ...]:
    """What tells whose latents they are: the scaling, then the norm of each tensor of the VAE's encoder.

    To four digits. The decoder may be another: it does not change latents.
    """
    norms = [float(tensor.detach().double().norm()) for tensor in vae.encoder.parameters()]
    return tuple(float(f"{value:.4g}") for value in (vae.scaling_factor, *norms))


def same_latents(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two fingerprints are of one encoder, in whatever dtypes."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=SAME, abs_tol=1e-6) for a, b in zip(one, other, strict=True)
    )
