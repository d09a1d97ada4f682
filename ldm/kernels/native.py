"""The C++ kernels as functions of tensors: fp32, on a CPU, without gradients."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ldm.kernels.build import library

# Tiles that are convolved together: their numbers, 36 for each channel and tile, stay in the caches.
TILE_NUMBERS = 36 * 96 * 640


def available() -> bool:
    """Whether there are kernels. The first call may compile them, which takes seconds."""
    return library() is not None


def fits(*tensors: Tensor) -> bool:
    """Whether kernels take them, and there are any."""
    return plain(*tensors) and available()


def plain(*tensors: Tensor) -> bool:
    """Drawing on a CPU, the first in fp32: no gradient is wanted, no autocast, and nobody compiles."""
    if torch.compiler.is_compiling() or tensors[0].dtype is not torch.float32:
        return False
    if any(t.device.type != "cpu" or t.layout is not torch.strided for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not torch.is_autocast_enabled("cpu")


def pack_winograd(weight: Tensor) -> Tensor:
    """A 3 x 3 convolution's weight [O, C, 3, 3] as `convolve` takes it: four times as many numbers."""
    weight = weight.float()
    out_channels, in_channels = weight.shape[:2]
    shape = map(c_int64, (out_channels, in_channels))
    count = _library().winograd_numbers
    count.restype = c_int64
    packed = torch.empty(count(*shape))
    if _has_no_numbers(weight):
        return packed
    sizes = (out_channels, in_channels, *weight.stride())
    _library().pack_winograd(_pointer(weight), _pointer(packed), *map(c_int64, sizes), _threads())
    return packed


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int, padding: int = 1) -> Tensor:
    """A 3 x 3 convolution: [B, C, H, W] -> [B, O, H', W'], channels_last, H' = H + 2 padding - 2.

    By Winograd's F(4 x 4, 3 x 3), a quarter of the products; its rounding is 2e-6 of the result.

    Args:
        packed: `pack_winograd` of the weight.
        bias: [O].
        padding: 0 or 1 zero on all sides.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    out = torch.empty(
        (batch, out_channels, height + 2 * padding - 2, width + 2 * padding - 2),
        dtype=x.dtype,
        memory_format=torch.channels_last,
    )
    at_once = max(8, min(96, TILE_NUMBERS // (36 * max(channels, out_channels))))
    if _has_no_numbers(x):  # what the kernel takes for itself comes and goes too
        torch.empty(torch.get_num_threads() * 37 * at_once * (channels + out_channels))
        return out
    _library().convolve(
        *map(_pointer, (x, packed, bias, out)),
        *map(c_int64, (batch, height, width, channels, out_channels, padding, at_once)),
        _threads(),
    )
    return out


def _has_no_numbers(tensor: Tensor) -> bool:
    """Of the meta device, whatever it says: `ldm.memory` calls networks with such, to see what they take."""
    return tensor.untyped_storage().device.type == "meta"


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None  # `fits` has said so
    return found


def _pointer(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _threads() -> c_int:
    return c_int(torch.get_num_threads())
