"""A network's answer for large latents, averaged over windows of the size that it was trained on.

Bar-Tal et al. 2023, "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", equation 5:
what is nearest to the answers for all windows, each with its weight at each place, is their weighted
mean. Answers are raw outputs (eps, v or x0): at one x and sigma x0 is linear in
them, so that its mean is theirs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A part of latents [..., h, w], which it cuts out when it is called."""

    top: int
    left: int
    height: int
    width: int
    full_height: int  # of all
    full_width: int

    def __call__(self, x: Tensor) -> Tensor:
        """[..., h, w] -> [..., height, width]."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Tiles:
    """Windows of at most `size` rows and columns, which share `overlap` with their neighbours or more.

    All in latents; `downscale` is how many pixels one of them is.
    """

    size: int
    overlap: int
    downscale: int

    def is_whole(self, x: Tensor) -> bool:
        """Whether one window holds all of latents [B, C, h, w]."""
        return max(x.shape[-2:]) <= self.size

    def windows(self, height: int, width: int) -> list[Window]:
        """From the top left on. The last of a row or column ends with the picture."""
        tall, wide = min(self.size, height), min(self.size, width)
        corners = itertools.product(self._begins(height, tall), self._begins(width, wide))
        return [Window(top, left, tall, wide, height, width) for top, left in corners]

    def _begins(self, full: int, size: int) -> list[int]:
        return [*range(0, full - size, self.size - self.overlap), full - size]

    def averaged(self, x: Tensor, answer: Callable[[Window], Tensor]) -> Tensor:
        """The mean of the answers [B, C, height, width] for all windows of latents `x` [.., h, w], in fp32.

        Weights fall linearly from a window's middle to its edges, so that no edge shows.
        """
        total: Tensor | None = None
        weights = torch.zeros(x.shape[-2:], device=x.device)
        for window in self.windows(*x.shape[-2:]):
            out, weight = answer(window), self._weight(window, x.device)
            if total is None:
                total = out.new_zeros(*out.shape[:2], *x.shape[-2:])
            window(total).add_(weight * out)
            window(weights).add_(weight)
        assert total is not None
        return total / weights

    @staticmethod
    def _weight(window: Window, device: torch.device) -> Tensor:
        """[height, width], products of how near each row and column is to the middle: 1, 2, ..., 2, 1."""
        sides = []
        for n in (window.height, window.width):
            at = torch.arange(n, device=device)
            sides.append(torch.minimum(at + 1, n - at).float())
        return sides[0][:, None] * sides[1]
