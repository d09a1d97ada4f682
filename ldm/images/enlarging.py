"""Latents and pictures made larger by interpolation, before a second pass draws what is missing in them.

Names are those of A1111 in our spelling: "latent_bicubic" is its "Latent (bicubic)". Along the axes of
seamless pictures what lies beyond an edge is what lies at the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.images.fitting import fit_image
from ldm.images.pixels import to_pil
from ldm.spelling import squash

Size = tuple[int, int]
Enlarge = Callable[[Tensor, Size], Tensor]  # (x [B, C, h, w], (H, W)) -> [B, C, H, W]

# Name -> mode of torch's `interpolate`, and whether it is antialiased.
LATENT: Mapping[str, tuple[str, bool]] = {
    "latent": ("bilinear", False),
    "latent_antialiased": ("bilinear", True),
    "latent_bicubic": ("bicubic", False),
    "latent_bicubic_antialiased": ("bicubic", True),
    "latent_nearest": ("nearest", False),
    "latent_nearest_exact": ("nearest-exact", False),
}
PIXEL = ("lanczos", "nearest")
# As A1111 writes them into pictures.
LABELS: Mapping[str, str] = {
    "latent": "Latent",
    "latent_antialiased": "Latent (antialiased)",
    "latent_bicubic": "Latent (bicubic)",
    "latent_bicubic_antialiased": "Latent (bicubic antialiased)",
    "latent_nearest": "Latent (nearest)",
    "latent_nearest_exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
_NAMES = {squash(name): name for name in LABELS}
BORDER = 8  # rows beyond an edge that interpolation may look at, at least


def enlarger_name(text: str) -> str | None:
    """A name of `LABELS` in any spelling; None for another text, such as a file's name."""
    return _NAMES.get(squash(text))


def enlarge_latents(name: str, x: Tensor, size: Size) -> Tensor:
    """Latents [B, c, h, w] at another size, by a name of `LATENT`."""
    mode, antialias = LATENT[name]
    return F.interpolate(x, size, mode=mode, antialias=antialias)


def enlarge_pixels(name: str, images: Tensor, size: Size) -> Tensor:
    """Pictures [B, 3, h, w] in 0..1 at another size, by a name of `PIXEL`: Lanczos is Pillow's, of 8 bits."""
    if name == "nearest":
        return F.interpolate(images, size, mode="nearest-exact")
    return torch.cat([fit_image(each, size) for each in to_pil(images)]).to(images)


def continued(enlarge: Enlarge, axes: str | None) -> Enlarge:
    """`enlarge` of what continues at its other edge along `axes` ("x", "y", "xy")."""
    if axes is None:
        return enlarge

    def call(x: Tensor, size: Size) -> Tensor:
        (down, height), (right, width) = (
            _border(old, new) if axis in axes else (0, 0)
            for axis, old, new in zip("yx", x.shape[-2:], size, strict=True)
        )
        x = F.pad(x, (right, right, down, down), mode="circular")
        large = enlarge(x, (size[0] + 2 * height, size[1] + 2 * width))
        return large[..., height : height + size[0], width : width + size[1]]

    return call


def _border(old: int, new: int) -> tuple[int, int]:
    """How many rows to take beyond each edge, and how many they become: whole numbers of both."""
    unit = old // math.gcd(old, new)
    rows = min(old, -(-BORDER // unit) * unit)
    return rows, rows * new // old
