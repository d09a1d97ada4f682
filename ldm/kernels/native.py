"""The C++ kernels as functions of tensors: on a CPU, without gradients."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from mmap import mmap

import torch
from torch import Tensor

from ldm.kernels.build import library

# What kernels read and write where nothing else is said; sums are in fp32 or better.
DTYPES = (torch.float32, torch.bfloat16)
# Tiles that are convolved together: their numbers, 36 for each channel and tile, stay in the caches.
TILE_NUMBERS = 36 * 96 * 640
# What a weight's gradient makes at a time of its two inputs, in numbers.
GRADIENT_NUMBERS = 16 << 20


def available() -> bool:
    """Whether there are kernels. The first call may compile them, which takes seconds."""
    return library() is not None


def fits(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether kernels take them, and there are any."""
    return plain(*tensors, dtypes=dtypes) and available()


def plain(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Drawing on a CPU, the first in one of `dtypes`: no gradient is wanted, no autocast, nobody compiles."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wanted and _readable(tensors, dtypes)


def learns(*tensors: Tensor) -> bool:
    """Whether gradients are wanted of some of them, all fp32, that kernels can give."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    all_fp32 = all(t.dtype is torch.float32 for t in tensors)
    return wanted and all_fp32 and _readable(tensors, (torch.float32,)) and available()


def reachable(*tensors: Tensor) -> bool:
    """Whether they are numbers in a CPU's memory, nobody compiles, and there are kernels."""
    return _in_memory(tensors) and available()


def _readable(tensors: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Numbers in a CPU's memory, the first in one of `dtypes`; no autocast, and nobody compiles."""
    return tensors[0].dtype in dtypes and _in_memory(tensors) and not torch.is_autocast_enabled("cpu")


def _in_memory(tensors: tuple[Tensor, ...]) -> bool:
    if torch.compiler.is_compiling():
        return False
    return not any(t.device.type != "cpu" or t.layout is not torch.strided for t in tensors)


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
    bias = None if bias is None else bias.float()
    batch, channels, height, width = x.shape
    at_once = max(8, min(96, TILE_NUMBERS // (36 * max(channels, out_channels))))
    threads = torch.get_num_threads()
    sizes = (batch, height, width, channels, out_channels, padding, at_once)
    if _has_no_numbers(x):  # what the kernel takes for itself comes and goes too
        torch.empty(_library().convolve_scratch(*sizes, threads))
        return out
    half = x.dtype is torch.bfloat16
    _library().convolve(*_pointers(x, packed, bias, out), *sizes, half, threads)
    return out


def convolve_unpacked(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1, turned: bool = False
) -> Tensor:
    """`convolve` by the weight [O, C, 3, 3] as it lies, packed bit by bit where it is used, and never kept.

    Args:
        turned: by `weight.flip(2, 3).transpose(0, 1)`, as gradients go back: [B, O, H, W] -> [B, C, H', W'].
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.float()
    output, inputs, row, column = weight.stride()
    first, out_channels = 0, len(weight)
    if turned:
        first, out_channels = 2 * row + 2 * column, weight.shape[1]
        output, inputs, row, column = inputs, output, -row, -column
    x, out = _between(x, out_channels, padding)
    batch, channels, height, width = x.shape
    threads = torch.get_num_threads()
    if _has_no_numbers(x):
        torch.empty(_library().convolve_unpacked_scratch(batch, height, width, channels, padding, threads))
        return out
    sizes = (batch, height, width, channels, out_channels, padding, output, inputs, row, column)
    at = weight.data_ptr() + first * weight.element_size()
    given, bias_at, filled = _pointers(x, bias, out)
    half = x.dtype is torch.bfloat16
    _library().convolve_unpacked(given, at, bias_at, filled, *sizes, half, threads)
    return out


def weight_gradient(x: Tensor, grad: Tensor, padding: int = 1) -> Tensor:
    """Gradient [O, C, 3, 3] of the weight of `convolve`, by a quarter of the products too.

    The convolution is linear in its weight: this is the adjoint, of the same tiles and points.

    Args:
        x: the convolution's input [B, C, H, W].
        grad: gradient of its output [B, O, H', W'].
        padding: 0 or 1 zero on all sides.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    (batch, channels, height, width), out_channels = x.shape, grad.shape[1]
    gradient = torch.empty(3, 3, channels, out_channels)
    if _has_no_numbers(x):
        return gradient.permute(3, 2, 0, 1)
    tiles = batch * -(-grad.shape[2] // 4) * -(-grad.shape[3] // 4)
    rounds = -(-36 * tiles * (channels + out_channels) // GRADIENT_NUMBERS)
    at_once, threads = -(-tiles // rounds), torch.get_num_threads()
    seen, given = torch.empty(36 * at_once * channels), torch.empty(36 * at_once * out_channels)
    sums = torch.zeros(36, channels, out_channels)
    for start in range(0, tiles, at_once):
        count = min(at_once, tiles - start)
        sizes = (batch, height, width, channels, out_channels, padding, start, count, threads)
        _library().winograd_tiles(*_pointers(x, grad, seen, given), *sizes)
        left = seen[: 36 * count * channels].view(36, count, channels)
        right = given[: 36 * count * out_channels].view(36, count, out_channels)
        sums.baddbmm_(left.transpose(1, 2), right)
    _library().winograd_weight(*_pointers(sums, gradient), channels * out_channels, threads)
    return gradient.permute(3, 2, 0, 1)


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


def has_attention() -> bool:
    """Whether `attention` is there: for processors with AVX512-BF16, but without AMX."""
    return available() and bool(_library().has_attention())


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in bf16, of any lengths: sums in fp32, weights of values rounded to bf16.

    Args:
        q: [B, heads, N, d].
        k, v: [B, heads, M, d].

    Returns:
        [B, heads, N, d], laid out as [B, N, heads, d].
    """
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    (batch, heads, count, wide), threads = q.shape, torch.get_num_threads()
    out = q.new_empty(batch, count, heads, wide).transpose(1, 2)
    if _has_no_numbers(q):
        torch.empty(_library().attention_scratch(batch, heads, k.shape[2], wide, threads))
        return out
    strides = [each.stride(i) for each in (q, k, v, out) for i in (0, 2, 1)]
    given = (c_int64 * len(strides))(*strides)
    sizes = (batch, heads, count, k.shape[2], wide)
    _library().attention(*_pointers(q, k, v, out), given, *sizes, wide**-0.5, threads)
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
    found.convolve.argtypes = pointer * 4 + size * 7 + flag * 2
    found.convolve_scratch.argtypes = size * 7 + flag
    found.convolve_unpacked_scratch.argtypes = size * 5 + flag
    for name in ("winograd_numbers", "convolve_scratch", "convolve_unpacked_scratch"):
        getattr(found, name).restype = c_int64
    found.convolve_unpacked.argtypes = pointer * 4 + size * 10 + flag * 2
    found.winograd_tiles.argtypes = pointer * 4 + size * 8 + flag
    found.winograd_weight.argtypes = pointer * 2 + size + flag
    found.group_norm.argtypes = pointer * 4 + size * 4 + (c_double,) + flag * 3
    found.geglu_rows.argtypes = pointer * 2 + size * 2 + flag * 2
    if found.has_attention():
        found.attention.argtypes = pointer * 5 + size * 5 + (c_double,) + flag
        found.attention_scratch.argtypes = size * 4 + flag
        found.attention_scratch.restype = c_int64
    return found


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if each is None else each.data_ptr() for each in tensors]
