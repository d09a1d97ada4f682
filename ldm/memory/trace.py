"""The most memory that a call takes, found without any: its tensors have shapes and a life, but no numbers.

A network is called on the meta device, while every storage that comes and goes is counted. So the figure
follows the code: what a layer keeps, and when it lets go of it, is seen and not stated a second time. What
kernels take for themselves while they run cannot be seen; `scratch` states it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.kernels.convolution import is_imitated
from ldm.models.copying import copy_network
from ldm.runtime import resident_memory

M = TypeVar("M", bound=nn.Module)
META = torch.device("meta")


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of a call of networks on the meta device, as it would be on `device`.

    What was there before, weights and arguments, is not counted; what the call gives is.
    """
    return peak_and_rest(call, device)[0]


def peak_and_rest(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """`peak`, and the bytes that are still held when what it gave is gone: weights packed for kernels."""
    counted, before = _Counted(device), None if _LOADED else resident_memory()
    with torch.no_grad(), counted, _As(device):
        given = call()
    del given
    if before is not None:
        _LOADED.append(max(0, resident_memory() - before))
    return counted.most, counted.now


def loaded_by_tracing() -> int:
    """Bytes of torch's own code that the first trace of this process has loaded, and no drawing needs."""
    return _LOADED[0] if _LOADED else 0


_LOADED: list[int] = []


def on_meta(module: M) -> M:
    """The module with tensors that have no numbers: a new tree, unless it is one already."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(each.is_meta for each in tensors):
        return module
    memo: dict[int, Any] = {id(each): _without_numbers(each) for each in tensors}
    copied = copy_network(module, memo)
    for each in copied.modules():  # which would fetch weights
        each._forward_pre_hooks.clear()
        each._forward_hooks.clear()
    return copied


def _without_numbers(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _As(TorchFunctionMode):
    """Tensors on the meta device say that they are on another, as kernels are chosen by it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.answers = {
            torch.Tensor.device.__get__: device,
            torch.Tensor.is_cuda.__get__: device.type == "cuda",  # type: ignore[attr-defined]
            torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.answers:
            return self.answers[func]
        args = tuple(self._there(each) for each in args)
        kwargs = {name: self._there(each) for name, each in (kwargs or {}).items()}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            return _attend(q, k, v, self.device)
        if func in (torch.tensor, torch.arange, torch.zeros, torch.ones, torch.full, torch.empty):
            kwargs["device"] = META
        return func(*args, **kwargs)

    def _there(self, argument: Any) -> Any:
        names_one = isinstance(argument, str) and argument == str(self.device)
        return META if names_one or isinstance(argument, torch.device) else argument


def _attend(q: Tensor, k: Tensor, v: Tensor, device: torch.device) -> Tensor:
    """As large as what torch's attention gives, and holds.

    Kernels for the CPU and for CUDA hold no scores but a few rows', and give [B, N, heads, d] in memory; that
    for MPS holds them all.
    """
    batch, heads, n, _ = q.shape
    if device.type == "mps":
        scores = q.new_empty(batch, heads, n, k.shape[2])
        del scores
    return q.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts storages while they live. `most`: bytes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.now, self.most = device, 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and _key(each) not in given:
                self._add(each)
        self.most = max(self.most, self.now + scratch(func, args, out, self.device))
        return out

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def scratch(func: Any, args: tuple[Any, ...], out: Any, device: torch.device) -> int:
    """Bytes that the kernel of an operation takes for itself while it runs."""
    if device.type == "cpu" and func in (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default):
        x, weight = args[:2]
        if is_imitated(x.dtype) and weight.shape[2:] != (1, 1):  # torch's own kernel unfolds the input
            return int(out[:, 0].numel() * weight[0].numel() * x.element_size())
        return int(weight.numel() * weight.element_size())  # oneDNN packs it, at each call
    return 0
