"""The noise that CUDA's generator draws, on any machine: Philox 4x32-10 and Box-Muller.

Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 4.3. AUTOMATIC1111 calls it "NV":
pictures that were drawn on an NVIDIA card begin with it. Value i of draw k comes of the counter
(k, 0, i, 0) and the key (lower, upper half of the seed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]  # of 32 bits each, so that products fit

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _BITS = np.uint64(0xFFFFFFFF), np.uint64(32)


class Philox:
    """A generator with the seed of `torch.Generator("cuda").manual_seed(seed)`."""

    def __init__(self, seed: int) -> None:
        self.seed, self._draws = seed, 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Unit noise of `shape`, fp32 on the CPU.

        ``sqrt(-2 ln u) sin v`` with ``u = 2^-32 g0 + 2^-33`` and ``v = 2 pi (2^-32 g1 + 2^-33)``, in fp32.
        """
        g0, g1 = _philox(self._draws, math.prod(shape), self.seed)
        self._draws += 1
        u, v = (
            (g.astype(np.float32) * np.float32(scale / 2**32) + np.float32(scale / 2**33))
            for g, scale in ((g0, 1.0), (g1, 2 * math.pi))
        )
        normal = np.sqrt(np.float32(-2) * np.log(u)) * np.sin(v)
        return torch.from_numpy(normal.astype(np.float32).reshape(shape))


def _philox(draw: int, count: int, seed: int) -> tuple[Words, Words]:
    """The first two words that each of `count` threads gets in its draw of that number."""
    zeros = np.zeros(count, dtype=np.uint64)
    counter = [zeros + np.uint64(draw & 0xFFFFFFFF), zeros, np.arange(count, dtype=np.uint64), zeros]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        a, b = (multiplier * word for multiplier, word in zip(_MULTIPLIERS, counter[::2], strict=True))
        counter = [
            (b >> _BITS) ^ counter[1] ^ key[0],
            b & _LOW,
            (a >> _BITS) ^ counter[3] ^ key[1],
            a & _LOW,
        ]
        key = [(word + step) & _LOW for word, step in zip(key, _KEY_STEPS, strict=True)]
    return counter[0], counter[1]
