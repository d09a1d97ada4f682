"""Naming what is where from a U-Net's features: an auxiliary loss that makes words bind to places early."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import UNet
from ldm.postcards.vocabulary import COLOURS, KINDS

_HIDDEN = 128


class Alignment(nn.Module):
    """Reads kinds and colours off the features after the first level of the way up.

    There the text has met the coarsest layout. The noisy latents tell where something is and the text what it
    is, so to name it there the two must have been brought together.
    """

    def __init__(self, unet: UNet, kinds: int = len(KINDS), colours: int = len(COLOURS)) -> None:
        super().__init__()
        width = unet.config.block_out_channels[-1]
        self.split = (1 + kinds, colours)  # no kind is one too
        self.head = nn.Sequential(
            nn.Conv2d(width, _HIDDEN, 1), nn.SiLU(), nn.Conv2d(_HIDDEN, sum(self.split), 1)
        )
        self._features: Tensor | None = None
        unet.up_blocks[0].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._features = output if torch.is_grad_enabled() else None

    def forward(self, things: Tensor) -> Tensor:
        """Cross-entropy of kinds in all cells and of colours on things, of the U-Net's last call.

        things: [B, h, w], in each cell 1 + kind * colours + colour, or 0.
        """
        assert self._features is not None, "the U-Net has not been called"
        features, self._features = self._features, None
        if features.shape[2:] != things.shape[1:]:
            features = F.adaptive_avg_pool2d(features, (things.shape[1], things.shape[2]))
        kinds, colours = self.head(features).float().split(self.split, 1)
        there = things > 0
        number = things.clamp(min=1) - 1
        kind, colour = number // self.split[1], number % self.split[1]
        wrong_colour = F.cross_entropy(colours, colour, reduction="none")
        return F.cross_entropy(kinds, torch.where(there, 1 + kind, 0)) + (wrong_colour * there).mean()
