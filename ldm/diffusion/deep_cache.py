"""Deep features of a U-Net, kept over the steps of one drawing: they change slowly, and cost the most.

Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free", section 3.3: of `interval` steps the
network is computed whole in the first; in the others its shallow layers alone, which go on from the deep
features of that one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    """Features [B, C, h, w] that were computed in that place of the grid, for a `told`."""

    features: Tensor
    place: int
    told: object


class DeepCache:
    """The deep features of one drawing, by whose they are: a branch, and the window where there are such.

    Like a drawing's noise it is made for that drawing and forgotten with it, so that threads share nothing.

    Whether a call is whole follows from its noise level alone: the place in the grid is that of the last
    level which is not below it. So all calls of a solver at one level are of one kind: Heun's second call of
    a step is like the first of the next, and DPM2's in the middle like its step's own. No features are used
    above the level where they were computed (restarts, churn), nor for another text.
    """

    def __init__(self, interval: int, sigmas: Tensor) -> None:
        """interval: N, at least 1: every N-th level is computed whole. sigmas: the grid's, falling."""
        self._interval: int = interval
        self._levels: list[float] = sigmas[:-1].tolist()
        self._kept: dict[Hashable, _Kept] = {}

    def kept(self, told: Mapping[Hashable, object], sigma: Tensor) -> Tensor | None:
        """The features of all of `told`, joined along the batch; None if the call has to be whole.

        told: by whose features they are, what the network is told: the very object, not one like it.
        """
        found = [self._kept.get(key) for key in told]
        place = self._place(sigma)
        rows = [
            each.features
            for each, now in zip(found, told.values(), strict=True)
            if each is not None and each.told is now and 0 < place - each.place < self._interval
        ]
        return torch.cat(rows) if len(rows) == len(found) else None

    def keep(self, told: Mapping[Hashable, object], sigma: Tensor, features: Tensor) -> None:
        """Keep the features of a call that was whole."""
        place = self._place(sigma)
        for (key, now), rows in zip(told.items(), features.chunk(len(told)), strict=True):
            self._kept[key] = _Kept(rows, place, now)

    def _place(self, sigma: Tensor) -> int:
        return place_of(self._levels, sigma)


def place_of(levels: Sequence[float], sigma: Tensor) -> int:
    """The place among falling levels of the last that is not below `sigma`."""
    # Levels that a solver computes itself may miss the grid's by rounding.
    here = float(sigma) * (1 - 1e-6)
    return max(0, sum(level > here for level in levels) - 1)
