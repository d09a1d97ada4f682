"""FreeU: the way up of the U-Net heeds its deep features more, and of the way down's low frequencies less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreeU:
    """Si et al. 2023, "FreeU: Free Lunch in Diffusion U-Net", equations 4 to 6, as diffusers has them.

    At the two deepest levels of the way up the first half of the channels of what comes from below is
    multiplied by b, and of what comes from the other side the Fourier coefficients of the lowest frequencies,
    those of -1 and 0 along both axes, by s. It changes no weights and costs two small transforms a layer.
    """

    b1: float  # of the deepest level
    b2: float  # of the next
    s1: float
    s2: float

    def __call__(self, level: int, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] from below and [B, D, H, W] from beside, of a level counted from the deepest, 0."""
        if level > 1:
            return x, skip
        b, s = ((self.b1, self.s1), (self.b2, self.s2))[level]
        half = x.shape[1] // 2
        return torch.cat([b * x[:, :half], x[:, half:]], dim=1), low_frequencies(skip, s)


def low_frequencies(x: Tensor, scale: float) -> Tensor:
    """[B, C, H, W] with the Fourier coefficients of the frequencies -1 and 0 along both axes scaled.

    In fp32, which the transforms want; bf16 has none.
    """
    spectrum = torch.fft.fft2(x.float())
    rows, columns = torch.arange(-(x.shape[-2] > 1), 1), torch.arange(-(x.shape[-1] > 1), 1)
    spectrum[..., rows[:, None], columns] *= scale
    filtered: Tensor = torch.fft.ifft2(spectrum).real
    return filtered.to(x.dtype)
