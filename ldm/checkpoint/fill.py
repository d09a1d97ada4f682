"""Tensors of a file become the parameters of a module: strictly, cast once, without needless copies."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.errors import UserError, abbreviate

M = TypeVar("M", bound=nn.Module)

CHUNK = 2**18  # elements cast at a time: the intermediate fp32 stays in the processor's cache
ALIGNMENT = 64  # bytes
THREADS = 4  # at most: with more, they only wait for each other and for memory


class _Unfilled(TorchFunctionMode):
    """torch's random beginnings of parameters are left out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside the block modules are made on the meta device, to be given their tensors.

    Numbers are not drawn there: they would be none, but torch imports half a thousand modules (torch._dynamo,
    sympy) to know that, which takes longer than a picture of the embedded model.
    """
    with torch.device("meta"), _Unfilled():
        yield


# What is done with tensors that fit, in place of reading them: `filled_by`.
Otherwise = Callable[[nn.Module, Mapping[str, Tensor], Path, torch.dtype | None], object]
_OTHERWISE: ContextVar[Otherwise | None] = ContextVar("otherwise", default=None)


@contextmanager
def filled_by(otherwise: Otherwise) -> Iterator[None]:
    """Inside the block `fill` checks names and shapes, and leaves the rest to `otherwise`."""
    token = _OTHERWISE.set(otherwise)
    try:
        yield
    finally:
        _OTHERWISE.reset(token)


def fill(module: M, tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> M:
    """Give a module on the meta device its tensors, read from `path`: all of them, or an error and none.

    Without a dtype they stay what they are: pages of the file. With one they are ready for drawing: in that
    dtype, weights of convolutions channels_last. What differs from the file is copied, once, and the file's
    pages are let go as soon as they are read, so that no more than the module itself stays in memory.

    Raises:
        UserError: naming tensors that are missing, extra, of another shape, not finite, or not so in `dtype`.
    """
    check_names(module.state_dict(), tensors, path)
    if (otherwise := _OTHERWISE.get()) is not None:
        otherwise(module, tensors, path, dtype)
        return module
    copied = [name for name, tensor in tensors.items() if _differs(tensor, dtype)]
    sizes = [_room_for(tensors[name], dtype) for name in copied]
    with torch.inference_mode(False):  # whatever the caller's, as threads have a mode of their own
        room = torch.empty(sum(sizes), dtype=torch.uint8)
    rooms = dict(zip(copied, torch.split(room, sizes), strict=True))
    longest = max((tensors[name][0].numel() for name in copied if tensors[name].ndim), default=0)

    def make(name: str, scratch: Tensor) -> Tensor:
        tensor = tensors[name]
        if name in rooms:
            ready = _copy(tensor, rooms[name], dtype or tensor.dtype, scratch)
        else:
            ready = laid_out(tensor, tensor.shape) if dtype else tensor
        _check_finite(name, ready, tensor, path)
        let_go(tensor)
        return ready

    ready = _in_threads(make, tensors, max(CHUNK, longest))
    module.load_state_dict(dict(zip(tensors, ready, strict=True)), assign=True)
    return module


def check_names(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, *, has_config: bool = True
) -> None:
    """Raises UserError unless the tensors, read from `path`, have the names and shapes of those wanted.

    Args:
        has_config: they are wanted by the config.json beside `path`; else by what kind of model it seems.
    """
    misshaped = [
        f"{name} is {list(tensors[name].shape)}, {'config.json says ' if has_config else 'not '}"
        f"{list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    faults = [
        *_named("missing", sorted(wanted.keys() - tensors.keys())),
        *_named("not of this model", sorted(tensors.keys() - wanted.keys())),
        *_named("of the wrong shape", misshaped),
    ]
    if faults:
        why = (
            "Weights and config.json belong to different models."
            if has_config
            else "The file is damaged, or of another kind than it seems: fetch or convert it again."
        )
        raise UserError(f"{path}: tensors {'; '.join(faults)}.\n{why}")


def reshape(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file without a config.json, in the shapes of those wanted.

    Some tools store a linear layer as a convolution of 1 x 1, its bias too, or a matrix as that: where shapes
    differ in nothing but 1s, the numbers are the same and in the same order.

    Raises:
        UserError: naming tensors that are missing, extra or of another shape.
    """
    ready = {
        name: tensor.reshape(wanted[name].shape)
        if name in wanted and _without_ones(tensor) == _without_ones(wanted[name])
        else tensor
        for name, tensor in tensors.items()
    }
    check_names(wanted, ready, path, has_config=False)
    return ready


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _named(fault: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{fault}: {abbreviate(names)}"]


def _differs(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether it has to be copied. A 1 x 1 convolution is channels_last as it is, under other strides."""
    if dtype is None or not tensor.is_floating_point():
        return False
    return tensor.dtype is not dtype or not tensor.is_contiguous() or _is_spatial(tensor)


def _is_spatial(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[2:] != (1, 1)


def _room_for(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a copy."""
    size = tensor.numel() * (dtype or tensor.dtype).itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def _copy(tensor: Tensor, room: Tensor, dtype: torch.dtype, scratch: Tensor) -> Tensor:
    """The tensor in `room`, as `dtype`, channels_last if it is a convolution's."""
    copy = laid_out(room[: tensor.numel() * dtype.itemsize].view(dtype), tensor.shape)
    if tensor.ndim == 0 or dtype in (tensor.dtype, torch.float32):
        return copy.copy_(tensor)
    rows = max(1, CHUNK // tensor[0].numel())
    for source, target in zip(torch.split(tensor, rows), torch.split(copy, rows), strict=True):
        # fp16 to bf16 by way of fp32 is exact too, and three times as fast; so is permuting on the way in.
        wide = laid_out(scratch[: source.numel()], source.shape)
        target.copy_(wide.copy_(source))
    return copy


def laid_out(numbers: Tensor, shape: torch.Size) -> Tensor:
    """Contiguous numbers as a tensor of that shape, channels_last if it has four dimensions."""
    if len(shape) != 4:
        return numbers.view(shape)
    o, i, h, w = shape
    return numbers.view(o, h, w, i).permute(0, 3, 1, 2)


def _in_threads(make: Callable[[str, Tensor], Tensor], names: Collection[str], scratch: int) -> list[Tensor]:
    """`make` of each name, in threads that have room for so many fp32 and let torch start none of its own.

    Torch's threads wait for each other after each of thousands of short operations, and where other programs
    use the processors too that takes ten times as long as the work.
    """
    own, threads = threading.local(), torch.get_num_threads()
    count = min(THREADS, threads, len(names))
    with torch.inference_mode(False):
        scratches = [torch.empty(scratch) for _ in range(count)]
    begun = threading.Barrier(count + 1, timeout=60)

    def begin() -> None:
        own.scratch = scratches.pop()
        torch.set_num_threads(1)
        begun.wait()

    with ThreadPoolExecutor(max(1, count), initializer=begin) as pool:
        made = pool.map(lambda name: make(name, own.scratch), names)
        begun.wait()
        torch.set_num_threads(threads)  # it is this thread's own, but also what later threads begin with
        return list(made)


def widen(tensor: Tensor) -> Tensor:
    """Floats of one byte in fp32, exactly: torch has hardly a function for them. Others as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor Inf."""
    return bool(widen(tensor).isfinite().all())


def _check_finite(name: str, ready: Tensor, stored: Tensor, path: Path) -> None:
    # NaN and Inf survive in a sum, and one sum costs little. It may overflow by itself: then look closer.
    if not ready.is_floating_point() or widen(ready).sum().isfinite():
        return
    if not is_finite(stored):
        raise UserError(f"{path}: tensor {name} holds NaN or Inf: the model is damaged; fetch it again")
    if not is_finite(ready):
        raise UserError(f"{path}: tensor {name} is too large for {str(ready.dtype)[6:]}; give another dtype")


def let_go(tensor: Tensor) -> None:
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
