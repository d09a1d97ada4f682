"""The C++ kernels as functions of tensors: on a CPU, without gradients."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from mmap import mmap

import torch
from torch import Tensor

from ldm.kernels.build import library

# What kernels take that work number by number.
POINTWISE_DTYPES = (torch.float32, torch.bfloat16)
# Tiles that are convolved together: their numbers, 36 for each channel and tile, stay in the caches.
TILE_NUMBERS = 36 * 96 * 640


def available() -> bool:
    """Whether there are kernels. The first call may compile them, which takes seconds."""
    return library() is not None


def fits(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether kernels take them, and there are any."""
    return plain(*tensors, dtypes=dtypes) and available()


def plain(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Drawing on a CPU, the first in one of `dtypes`: no gradient is wanted, no autocast, nobody compiles."""
    if torch.compiler.is_compiling() or tensors[0].dtype not in dtypes:
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
    numbers = _library().winograd_numbers(out_channels, in_channels)
    if _has_no_numbers(weight):
        return torch.empty(numbers)
    # Mapped: in the heap, among tensors that come and go, what stays would leave them holes.
    packed = torch.frombuffer(mmap(-1, 4 * numbers), dtype=torch.float32)
    sizes = (out_channels, in_channels, *weight.stride())
    _library().pack_winograd(weight.data_ptr(), packed.data_ptr(), *sizes, torch.get_num_threads())
    return packed


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int, padding: int = 1) -> Tensor:
    """A 3 x 3 convolution: [B, C, H, W] -> [B, O, H', W'], channels_last, H' = H + 2 padding - 2.

    By Winograd's F(4 x 4, 3 x 3), a quarter of the products; its rounding is 2e-6 of the result.

    Args:
        packed: `pack_winograd` of the weight.
        bias: [O].
        padding: 0 or 1 zero on all sides.
    """
    x, out = _between(x, out_channels, padding)
    batch, channels, height, width = x.shape
    at_once = max(8, min(96, TILE_NUMBERS // (36 * max(channels, out_channels))))
    threads = torch.get_num_threads()
    sizes = (batch, height, width, channels, out_channels, padding, at_once)
    if _has_no_numbers(x):  # what the kernel takes for itself comes and goes too
        torch.empty(_library().convolve_scratch(*sizes, threads))
        return out
    _library().convolve(*_pointers(x, packed, bias, out), *sizes, threads)
    return out


def convolve_unpacked(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1) -> Tensor:
    """`convolve` by the weight [O, C, 3, 3] as it lies, packed bit by bit where it is used, and never kept.

    For maps of few pixels, whose weights are most of what is read, that is as fast.
    """
    weight = weight.float()
    x, out = _between(x, len(weight), padding)
    batch, channels, height, width = x.shape
    threads = torch.get_num_threads()
    if _has_no_numbers(x):
        torch.empty(_library().convolve_unpacked_scratch(batch, height, width, channels, padding, threads))
        return out
    sizes = (batch, height, width, channels, len(weight), padding, *weight.stride())
    _library().convolve_unpacked(*_pointers(x, weight, bias, out), *sizes, threads)
    return out


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """GroupNorm of x [B, C, H, W] in fp32 or bf16, channels_last, with SiLU after it where asked.

    Statistics are exact: torch's own in channels_last are off by 1e-4 on maps of a million pixels.

    Args:
        weight, bias: [C].
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    if _has_no_numbers(x):
        return out
    batch, channels, height, width = x.shape
    sizes = (batch, height * width, channels, groups)
    given = (x, weight.float(), bias.float(), out)
    half = x.dtype is torch.bfloat16
    _library().group_norm(*_pointers(*given), *sizes, eps, silu, half, torch.get_num_threads())
    return out


def geglu(x: Tensor) -> Tensor:
    """[..., 2 D] -> [..., D] in fp32 or bf16: value * gelu(gate) with [value, gate] = x."""
    x = x.contiguous()
    wide = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], wide))
    if not _has_no_numbers(x):
        half = x.dtype is torch.bfloat16
        _library().geglu_rows(*_pointers(x, out), out.numel() // wide, wide, half, torch.get_num_threads())
    return out


def _between(x: Tensor, out_channels: int, padding: int) -> tuple[Tensor, Tensor]:
    """What a convolution reads and what it fills, channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    size = [side + 2 * padding - 2 for side in x.shape[2:]]
    shape = (len(x), out_channels, *size)
    return x, torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)


def _has_no_numbers(tensor: Tensor) -> bool:
    """Of the meta device, whatever it says: `ldm.memory` calls networks with such, to see what they take."""
    return tensor.untyped_storage().device.type == "meta"


@cache
def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None  # `fits` has said so
    pointer, size, flag = (c_void_p,), (c_int64,), (c_int,)
    found.winograd_numbers.argtypes = size * 2
    found.pack_winograd.argtypes = pointer * 2 + size * 6 + flag
    found.convolve.argtypes = pointer * 4 + size * 7 + flag
    found.convolve_scratch.argtypes = size * 7 + flag
    found.convolve_unpacked_scratch.argtypes = size * 5 + flag
    for name in ("winograd_numbers", "convolve_scratch", "convolve_unpacked_scratch"):
        getattr(found, name).restype = c_int64
    found.convolve_unpacked.argtypes = pointer * 4 + size * 10 + flag
    found.group_norm.argtypes = pointer * 4 + size * 4 + (c_double,) + flag * 3
    found.geglu_rows.argtypes = pointer * 2 + size * 2 + flag * 2
    return found


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if each is None else each.data_ptr() for each in tensors]
