"""ControlNet-LLLite (kohya's sd-scripts, control_net_lllite.py): small networks before a U-Net's layers.

``x + up(mid([embedding of the picture, down(x)]))`` is what a layer of attention is given in place of x; the
embedding is the picture's alone, and so made once for all steps. Names are kohya's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.kernels.convolution import Conv2d
from ldm.models.attention import to_tokens


class LLLiteLayer(nn.Module):
    """What is added to the input [B, N, dim] of one linear layer."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        """Of the `shapes` of its tensors. Raises KeyError or IndexError for shapes of another network."""
        super().__init__()
        picture: list[nn.Module] = []
        for k in (0, 2, 4):
            if k == 0 or f"conditioning1.{k}.weight" in shapes:
                out, channels, kernel, _ = shapes[f"conditioning1.{k}.weight"]
                picture += [*[nn.ReLU()] * bool(picture), Conv2d(channels, out, kernel, stride=kernel)]
        self.conditioning1 = nn.Sequential(*picture)
        linear = {part: nn.Linear(*shapes[f"{part}.0.weight"][1::-1]) for part in ("down", "mid", "up")}
        self.down = nn.Sequential(linear["down"], nn.ReLU())
        self.mid = nn.Sequential(linear["mid"], nn.ReLU())
        self.up = nn.Sequential(linear["up"])

    @property
    def stride(self) -> int:
        """Pixels a side of the picture that become one place."""
        total = 1
        for layer in self.conditioning1:
            total *= layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        return total

    def embed(self, picture: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> [B, N, D]."""
        return to_tokens(self.conditioning1(2 * picture - 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        seen = torch.cat([embedding.to(x.dtype).expand(len(x), -1, -1), self.down(x)], dim=2)
        out: Tensor = self.up(self.mid(seen))
        return out


class LLLite(nn.Module):
    """Networks before layers of a U-Net, by the layers' paths."""

    class_name = "ControlNet-LLLite"

    def __init__(self, layers: Mapping[str, LLLiteLayer]) -> None:
        super().__init__()
        self.paths = tuple(layers)
        self.layers = nn.ModuleList(layers.values())

    @property
    def stride(self) -> int:
        """Sides of pictures are multiples of it."""
        return max(layer.stride for layer in self.layers if isinstance(layer, LLLiteLayer))

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        """[1, 3, H, W] in 0..1 -> the embedding [1, N, D] of each layer."""
        return tuple(layer.embed(picture) for layer in self.layers if isinstance(layer, LLLiteLayer))


class LLLiteLinear(nn.Module):
    """A U-Net's layer, with what an LLLite's layer adds to its input."""

    def __init__(self, layer: nn.Module, own: LLLiteLayer, embedding: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.own, self.embedding, self.scale = layer, own, embedding, scale

    def forward(self, x: Tensor) -> Tensor:
        own = next(self.own.parameters()).dtype
        out: Tensor = self.layer(x + (self.scale * self.own(x.to(own), self.embedding)).to(x.dtype))
        return out
