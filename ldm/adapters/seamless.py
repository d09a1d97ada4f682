"""Networks whose pictures continue at their other edge: every convolution pads with what lies there.

Nothing else in them knows of edges: attention has no places, norms take the whole picture, and pixels are
doubled one by one. So a picture that is rolled is drawn as the picture, rolled.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn import functional as F

from ldm.adapters.layers import share
from ldm.models.layers import Downsample

M = TypeVar("M", bound=nn.Module)
Sides = tuple[int, int, int, int]  # left, right, above, below


def seamless(module: M, axes: str) -> M:
    """A module that shares all tensors of `module`, and is circular along `axes`: "x", "y" or "xy"."""
    made = share(module)
    for layer in made.modules():
        if isinstance(layer, Downsample) and layer.pad_right_bottom:  # padded outside of its convolution
            layer.pad_right_bottom = False
            _pad_before(layer.conv, (0, 1, 0, 1), axes)
        elif isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid"):
            assert not isinstance(layer.padding, str)
            (down, right), layer.padding = layer.padding, (0, 0)
            _pad_before(layer, (right, right, down, down), axes)
    return made


def _pad_before(conv: nn.Conv2d, sides: Sides, axes: str) -> None:
    """Let a private copy of a convolution pad its input: round the picture along `axes`, else by zeros.

    A hook, not another class: what lies beside a convolution (`AdaptedConv2d`) is padded with it.
    """
    wrapped = [side if axis in axes else 0 for side, axis in zip(sides, "xxyy", strict=True)]
    zeros = [side - kept for side, kept in zip(sides, wrapped, strict=True)]

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (F.pad(F.pad(inputs[0], wrapped, mode="circular"), zeros), *inputs[1:])

    conv.register_forward_pre_hook(hook)
