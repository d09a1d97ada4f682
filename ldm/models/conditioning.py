"""What a network is told beside the noisy latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """One row per picture; fp32, cast where the network is called. None is what a model does not take."""

    tokens: Tensor  # [B, N, D] text embedding, for cross-attention
    pooled: Tensor | None = None  # [B, P] pooled text (SDXL)
    time_ids: Tensor | None = None  # [B, 6] sizes and crops (SDXL), or 5 with an aesthetic score (refiner)
    class_labels: Tensor | None = None  # [B] noise level of the low-resolution picture (upscaler)
    timestep_cond: Tensor | None = None  # [B, time_cond_proj_dim] embedded guidance scale (LCM)
    concat: Tensor | None = None  # [B, C, h, w] appended to the scaled latents
    image_tokens: Tensor | None = None  # [B, K, D] of image prompts, which what attends may read beside

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice) -> Self:
        """Some of the rows."""
        return self._map(lambda field: field[rows])

    def zeros(self) -> Self:
        """As many rows of zeros."""
        return self._map(torch.zeros_like)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, which must have the same N and the same fields."""
        columns = {each.name: [getattr(part, each.name) for part in parts] for each in fields(cls)}
        given = {name: torch.cat(rows) for name, rows in columns.items() if rows[0] is not None}
        return cls(**given)
