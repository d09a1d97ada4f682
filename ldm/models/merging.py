"""Token merging: attention among fewer tokens, of which each stands for several that are alike.

Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion", section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STRIDE = 2  # of each 2 x 2 tokens one stays: at most three of four are merged


class Merging:
    """Which tokens of each picture are merged, by how alike they are. Of each row alone, and without chance.

    The tokens at the top left of each 2 x 2 stay. The others (sources) look for the most similar of those,
    by the cosine, and the `ratio` of all tokens that find the most similar ones are merged into theirs: the
    mean of all that go to one place. The paper draws the one of each 2 x 2 at random; AUTOMATIC1111 takes
    the top left too. On CUDA means are summed in no fixed order, so that last bits may differ.
    """

    def __init__(self, tokens: Tensor, size: tuple[int, int], ratio: float) -> None:
        """tokens: [B, N, C] of N = height * width pixels; size: (height, width). ratio: 0 to 1."""
        stay, leave = _partition(size, tokens.device)
        unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        alike, to = (unit[:, leave] @ unit[:, stay].transpose(1, 2)).max(dim=-1)
        order = alike.argsort(dim=-1, descending=True, stable=True)
        merged = min(int(tokens.shape[1] * ratio), len(leave))
        self._stay = stay.expand(len(tokens), -1)
        self._merged, self._alone = leave[order[:, :merged]], leave[order[:, merged:]]
        self._to = to.gather(1, order[:, :merged])  # places among those that stay

    def merge(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N - merged, C]: those that nothing happens to, then those that stay."""
        to = self._to[..., None].expand(-1, -1, x.shape[-1])
        means = _take(x, self._stay).scatter_reduce(1, to, _take(x, self._merged), "mean")
        return torch.cat([_take(x, self._alone), means], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """[B, N - merged, C] -> [B, N, C]: every token has what its own one has."""
        alone = self._alone.shape[1]
        own = torch.cat([x, _take(x[:, alone:], self._to)], dim=1)
        at = torch.cat([self._alone, self._stay, self._merged], dim=1)
        return torch.empty_like(own).scatter(1, at[..., None].expand_as(own), own)


def merged(attention: Callable[[Tensor], Tensor], x: Tensor, size: tuple[int, int], ratio: float) -> Tensor:
    """Self-attention of tokens [B, N, C], `ratio` of which are merged before it and parted behind it."""
    merging = Merging(x, size, ratio)
    return merging.unmerge(attention(merging.merge(x)))


def _take(x: Tensor, places: Tensor) -> Tensor:
    """[B, N, C], [B, K] -> [B, K, C]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _partition(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the tokens that stay and of the others; none stays in a last row or column that is odd."""
    height, width = size
    stays = torch.zeros(height, width, dtype=torch.uint8, device=device)
    stays[: height // STRIDE * STRIDE : STRIDE, : width // STRIDE * STRIDE : STRIDE] = 1
    # Sorted, as `nonzero` would make the host wait for a card to learn how many there are.
    places = stays.flatten().argsort(descending=True, stable=True)
    count = (height // STRIDE) * (width // STRIDE)
    return places[:count], places[count:]
