"""What a network is told beside the noisy latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """One row per picture; fp32, cast where the network is called."""

    tokens: Tensor  # [B, N, D] text embedding, for cross-attention

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, which must have the same N."""
        return cls(torch.cat([part.tokens for part in parts]))
