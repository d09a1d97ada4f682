"""Tensors of a file become the parameters of a module: strictly, cast once, without needless copies."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.errors import UserError

M = TypeVar("M", bound=nn.Module)

CHUNK = 2**20  # elements cast at a time: the intermediate fp32 stays in the processor's cache
ALIGNMENT = 64  # bytes


def fill(module: M, tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> M:
    """Give a module on the meta device its tensors, read from `path`: all of them, or an error and none.

    Without a dtype they stay what they are: pages of the file. With one they are ready for drawing: in that
    dtype, weights of convolutions channels_last. What differs from the file is copied, once, and the file's
    pages are let go as soon as they are read, so that no more than the module itself stays in memory.

    Raises:
        UserError: naming tensors that are missing, extra, of another shape, not finite, or not so in `dtype`.
    """
    _check_names(module.state_dict(), tensors, path)
    copied = {name for name, tensor in tensors.items() if _differs(tensor, dtype)}
    room = torch.empty(sum(_room_for(tensors[name], dtype) for name in copied), dtype=torch.uint8)
    rows = (tensors[name][0].numel() for name in copied if tensors[name].ndim)
    scratch = torch.empty(8 * max((CHUNK, *rows)), dtype=torch.uint8)
    ready = {}
    for name, tensor in tensors.items():
        if name in copied:
            size = _room_for(tensor, dtype)
            ready[name] = _copy(tensor, room[:size], dtype or tensor.dtype, scratch)
            room = room[size:]
        else:
            ready[name] = _as_channels_last(tensor) if dtype else tensor
        _check_finite(name, ready[name], tensor, path)
        _let_go(tensor)
    module.load_state_dict(ready, assign=True)
    return module


def _check_names(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    misshaped = [
        f"{name} is {list(tensors[name].shape)}, config.json says {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    faults = [
        *_named("missing", sorted(wanted.keys() - tensors.keys())),
        *_named("not of this model", sorted(tensors.keys() - wanted.keys())),
        *_named("of the wrong shape", misshaped),
    ]
    if faults:
        raise UserError(
            f"{path}: tensors {'; '.join(faults)}.\nWeights and config.json belong to different models."
        )


def _named(fault: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{fault}: {', '.join(names[:2])}{more}"]


def _differs(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether it has to be copied. A 1 x 1 convolution is channels_last as it is, under other strides."""
    if dtype is None or not tensor.is_floating_point():
        return False
    return tensor.dtype is not dtype or not tensor.is_contiguous() or _is_spatial(tensor)


def _is_spatial(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[2:] != (1, 1)


def _as_channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor
    channels = tensor.shape[1]
    return tensor.as_strided(tensor.shape, (channels, 1, channels, channels))


def _room_for(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a copy."""
    size = tensor.numel() * (dtype or tensor.dtype).itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def _copy(tensor: Tensor, room: Tensor, dtype: torch.dtype, scratch: Tensor) -> Tensor:
    """The tensor in `room`, as `dtype`, channels_last if it is a convolution's."""
    flat = room[: tensor.numel() * dtype.itemsize].view(dtype)
    if tensor.ndim == 4:
        o, i, h, w = tensor.shape
        copy = flat.view(o, h, w, i).permute(0, 3, 1, 2)
    else:
        copy = flat.view(tensor.shape)
    if tensor.ndim == 0 or tensor.dtype is dtype:
        return copy.copy_(tensor)
    rows = max(1, CHUNK // tensor[0].numel())
    for source, target in zip(torch.split(tensor, rows), torch.split(copy, rows), strict=True):
        # fp16 to bf16 by way of fp32 is exact too, and three times as fast; so is casting before permuting.
        wide = _as(scratch, torch.float32, source.shape).copy_(source)
        if tensor.ndim == 4:
            half = scratch[len(scratch) // 2 :]
            wide = _as(half, dtype, source.shape).copy_(wide)
        target.copy_(wide)
    return copy


def _as(room: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return room[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _check_finite(name: str, ready: Tensor, stored: Tensor, path: Path) -> None:
    # NaN and Inf survive in a sum, and one sum costs little. It may overflow by itself: then look closer.
    if not ready.is_floating_point() or ready.dtype.itemsize == 1 or ready.sum().isfinite():
        return
    if not stored.isfinite().all():
        raise UserError(f"{path}: tensor {name} holds NaN or Inf: the model is damaged; fetch it again")
    if not ready.isfinite().all():
        raise UserError(f"{path}: tensor {name} is too large for {str(ready.dtype)[6:]}; give another dtype")


def _let_go(tensor: Tensor) -> None:
    """Drop the file's pages from memory; if they are needed again, the system maps them again."""
    storage = tensor.untyped_storage()
    pages = getattr(storage, "pages", None)
    if pages is None or not hasattr(mmap, "MADV_DONTNEED") or not tensor.is_contiguous():
        return
    # Only whole pages: a neighbour at the edge may be in use, and changed, by another module.
    begin = tensor.data_ptr() - storage.data_ptr()
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + tensor.numel() * tensor.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        pages.madvise(mmap.MADV_DONTNEED, first, last - first)
