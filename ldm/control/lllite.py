"""A U-Net with the layers of LLLites before its own: a copy that shares all tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.adapters.layers import share
from ldm.models import UNet
from ldm.models.control import LLLite, LLLiteLayer, LLLiteLinear

if TYPE_CHECKING:
    from ldm.control.controls import Control


def with_lllites(unet: UNet, controls: Sequence[tuple[Control, tuple[Tensor, ...]]]) -> UNet:
    """`unet` with each of the controls, whose embeddings of the picture come beside it."""
    made = share(unet)
    for control, embeddings in controls:
        network = control.file.network
        assert isinstance(network, LLLite)
        for path, own, embedding in zip(network.paths, network.layers, embeddings, strict=True):
            assert isinstance(own, LLLiteLayer)
            parent, _, name = path.rpartition(".")
            layer = made.get_submodule(path)
            setattr(made.get_submodule(parent), name, LLLiteLinear(layer, own, embedding, control.use.scale))
    return made
