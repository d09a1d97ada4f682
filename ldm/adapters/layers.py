"""Modules that share the tensors of others and compute something beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.adapters.deltas import Delta
from ldm.kernels.convolution import Conv2d
from ldm.memory.residence import awake
from ldm.models.copying import copy_network
from ldm.runtime import memory_format

M = TypeVar("M", bound=nn.Module)
Weighted = tuple[Delta, float]  # and how strongly


class AdaptedLinear(nn.Linear):
    """[..., in] -> [..., out]: W x + b + up (down x), with another layer's W and b.

    Args:
        down: [r, in].
        up: [out, r], scaled.
    """

    def __init__(self, layer: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        # Not persistent: `state_dict` keeps the names and tensors of the model below.
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.get_buffer("down")), self.get_buffer("up"))


class AdaptedConv2d(Conv2d):
    """[B, in, H, W] -> [B, out, H', W']: W x + b + up (down x), with another layer's W and b.

    Args:
        down: [r, in, k, k], which strides and pads as W does.
        up: [out, r], scaled.
    """

    def __init__(self, layer: nn.Conv2d, down: Tensor, up: Tensor) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]  # torch's stubs: any tuple
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up[:, :, None, None], persistent=False)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        inner = self._conv_forward(x, self.get_buffer("down"), None)
        return super().forward(x) + F.conv2d(inner, self.get_buffer("up"))


def share(module: M) -> M:
    """A new tree of modules with the very same parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy_network(module, {id(tensor): tensor for tensor in tensors})


def adapt_module(module: M, changes: Mapping[str, Sequence[Weighted]], fused: bool) -> M:
    """A module that shares all tensors of `module` but has `changes`, by a layer's path.

    Low-rank changes are computed beside the layer, as long as it has no others; with `fused`, and for the
    other kinds, the layer gets a weight of its own, computed in fp32 and cast once. So does a bias that is
    changed. The changes must fit: `Delta.check` says whether they do.
    """
    adapted = share(module)
    for path, deltas in changes.items():
        parent, _, name = path.rpartition(".")
        layer = adapted.get_submodule(path)  # a private copy, made by `share`
        if any(delta.has_bias for delta, _ in deltas):
            layer.bias = _own_bias(layer, deltas)
        weights = [(delta, weight) for delta, weight in deltas if delta.has_weight]
        if weights and not fused and all(delta.is_low_rank for delta, _ in weights):
            setattr(adapted.get_submodule(parent), name, _beside(layer, weights))
        elif weights:
            layer.weight = _own_weight(layer, weights)
    return adapted


def _beside(layer: nn.Module, deltas: Sequence[Weighted]) -> nn.Module:
    """The sum of several low-rank products is one, of the ranks' sum."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    factors = [(delta.factors(layer.weight), weight) for delta, weight in deltas]
    down = torch.cat([down for (down, _), _ in factors]).to(layer.weight.dtype)
    up = torch.cat([weight * up for (_, up), weight in factors], dim=1).to(layer.weight.dtype)
    made: nn.Module
    if isinstance(layer, nn.Linear):
        made = AdaptedLinear(layer, down, up)
    else:
        made = AdaptedConv2d(layer, down.contiguous(memory_format=memory_format(down.device)), up)
    made._forward_pre_hooks, made._forward_hooks = layer._forward_pre_hooks, layer._forward_hooks
    made._forward_hooks_always_called = layer._forward_hooks_always_called
    return made


def _own_weight(layer: nn.Module, deltas: Sequence[Weighted]) -> nn.Parameter:
    """The layer's weight with the changes."""
    old = layer.get_parameter("weight")
    with awake(old):
        new = old.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        for delta, weight in deltas:
            if delta.is_low_rank:
                down, up = delta.factors(new)
                new.flatten(1).addmm_(up, down.flatten(1), alpha=weight)
            else:
                new += weight * delta.change(old.detach().float())
    return _like(old, new)


def _own_bias(layer: nn.Module, deltas: Sequence[Weighted]) -> nn.Parameter:
    """The layer's bias with the changes."""
    old = layer.get_parameter("bias")
    with awake(old):
        new = old.detach().to(torch.float32, copy=True)
    for delta, weight in deltas:
        new = new + weight * delta.change_bias(new)
    return _like(old, new)


def _like(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    """`new` [...] (fp32) in the dtype and memory format of `old`."""
    own = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=old.device)
    return nn.Parameter(own.copy_(new), requires_grad=old.requires_grad)
