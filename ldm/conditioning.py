"""What a network is told beside the noisy latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from ldm.models.layers import timestep_features
from ldm.request import Request


@dataclass(frozen=True)
class Conditioning:
    """One row per picture; fp32, cast where the network is called. None is what a model does not take."""

    tokens: Tensor  # [B, N, D] text embedding, for cross-attention
    pooled: Tensor | None = None  # [B, P] pooled text (SDXL)
    time_ids: Tensor | None = None  # [B, 6] sizes and crops (SDXL), or 5 with an aesthetic score (refiner)
    class_labels: Tensor | None = None  # [B] noise level of the low-resolution picture (upscaler)
    timestep_cond: Tensor | None = None  # [B, time_cond_proj_dim] embedded guidance scale (LCM)
    concat: Tensor | None = None  # [B, C, h, w] appended to the scaled latents

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


def time_ids(request: Request, aesthetic: bool) -> tuple[Tensor, Tensor]:
    """What SDXL is told of sizes, for the prompt and the negative prompt: [1, 6] each, in pixels.

    (original height, width, top, left, target height, width); with `aesthetic` a score takes the target's
    place: [1, 5]. Podell et al. 2023, "SDXL", section 2.2.
    """
    drawn = (request.height or 0, request.width or 0)
    original, target = request.original_size or drawn, request.target_size or drawn
    crop = request.crops_coords_top_left or (0, 0)
    score, negative_score = request.aesthetic_score or 0.0, request.negative_aesthetic_score or 0.0
    rows = [
        (*original, *crop, *((score,) if aesthetic else target)),
        (
            *(request.negative_original_size or original),
            *(request.negative_crops_coords_top_left or crop),
            *((negative_score,) if aesthetic else request.negative_target_size or target),
        ),
    ]
    ids = torch.tensor(rows, dtype=torch.float32)
    return ids[:1], ids[1:]


def guidance_embedding(guidance_scale: float, dim: int) -> Tensor:
    """What an LCM is told of the guidance that it was distilled with: [1, dim].

    Sines, then cosines, of ``1000 (guidance_scale - 1)`` times falling frequencies; Luo et al. 2023,
    "Latent Consistency Models", section 4.2, with the scale counted as elsewhere (1 is none).
    """
    return timestep_features(torch.tensor([1000 * (guidance_scale - 1)]), dim, False, 1)
