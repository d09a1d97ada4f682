"""A card that is none: tensors which say that they are on "cuda", and lie and compute on the CPU.

What CUDA refuses is refused here too, operands on two devices above all; and whatever makes the host wait for
a card is written down. So what a card would be asked for is rehearsed where there is none. Numbers are the
CPU's: what a card's own kernels do, only a card says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CARD = torch.device("cuda", 0)
aten = torch.ops.aten
# What the host must know of values for: how long the output is, or which way to go.
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
WAITS |= {aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor}
COPIES = {aten._to_copy.default, aten.copy_.default}
# What takes indices or scalars from the host too, and sends them to the card first.
SENDS = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten.where.self}


class OnCard(Tensor):
    """A tensor of the CPU that says it is on the card."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> OnCard:
        options: dict[str, Any] = {"dtype": own.dtype, "device": CARD, "requires_grad": False}
        layout = {"strides": own.stride(), "storage_offset": own.storage_offset()}
        made: OnCard = Tensor._make_wrapper_subclass(cls, own.size(), **layout, **options)
        made.own = own
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the fake card's mode")


class Card(TorchDispatchMode):
    """While it is entered: the card.

    waits: what made the host wait, as aten calls it. pinned: tensors of the CPU that the system does not
    move, which alone a card gets without waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: list[Tensor] = []

    def pin(self, tensor: Tensor) -> Tensor:
        """As `Tensor.pin_memory`."""
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        known = {id(each.own): each for each in given if isinstance(each, OnCard)}
        device = kwargs.get("device")
        here = bool(known) if device is None else torch.device(device).type == "cuda"
        self._count(func, given, known, here, kwargs)
        if device is not None and (known or here):
            kwargs["device"] = torch.device("cpu")
        own_args, own_kwargs = _each(_own, (args, kwargs))
        if func is aten._to_copy.default:  # a copy even where the CPU sees nothing to do
            own_kwargs.pop("non_blocking", None)
        out = func(*own_args, **own_kwargs)
        if func is aten.copy_.default:
            return args[0]
        if not here:
            return out
        return _each(lambda each: known[id(each)] if id(each) in known else OnCard(each), out)

    def _count(self, func: Any, given: list[Tensor], known: dict[int, Any], here: bool, kwargs: Any) -> None:
        """Write down what waits; raise what CUDA raises."""
        others = [each for each in given if not isinstance(each, OnCard)]
        crosses = bool(known) != here or (func is aten.copy_.default and bool(known) and bool(others))
        if func in COPIES and crosses:
            from_pinned = any(each is given[-1] for each in self.pinned)
            if not (here and from_pinned and kwargs.get("non_blocking", False)):
                self.waits.append(f"{func} of {list(given[-1].shape)}")
        elif known and (func in WAITS or (others and func in SENDS) or _by_mask(func, given)):
            self.waits.append(str(func))
        elif known and any(each.ndim for each in others) and func not in SENDS:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device: cuda and cpu")


def _by_mask(func: Any, given: list[Tensor]) -> bool:
    """Whether it takes the places where a mask is true: as many as those are."""
    return func is aten.index.Tensor and any(each.dtype is torch.bool for each in given[1:])


class Calls(TorchFunctionMode):
    """What torch does of tensors before any operator is called, and not without a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(CARD if device.type == "cuda" else device)
        if func in PYTHON:
            kinds = {isinstance(each, OnCard) for each in _tensors((args, kwargs))}
            if kinds == {True}:
                out = func(*_each(_own, args), **_each(_own, kwargs))
                return OnCard(out) if isinstance(out, Tensor) else out
            assert func is not F.scaled_dot_product_attention or kinds == {False}, "attention of two devices"
        return func(*args, **kwargs)


# torch's own pytree does the same in several times the time, and here it is done for each operator.


def _tensors(given: Any) -> list[Tensor]:
    """The tensors of a call's arguments."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, tuple | list):
        return []
    return [tensor for each in given for tensor in _tensors(each)]


def _each(change: Callable[[Tensor], Tensor], given: Any) -> Any:
    """Arguments or results with each of their tensors changed."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, tuple | list):
        return type(given)(_each(change, each) for each in given)
    if isinstance(given, dict):
        return {name: _each(change, each) for name, each in given.items()}
    return given


def _own(tensor: Tensor) -> Tensor:
    return tensor.own if isinstance(tensor, OnCard) else tensor


# Without values, as far as basic indices go; kernels of attention are chosen by the driver.
PYTHON = (F.scaled_dot_product_attention, Tensor.__getitem__, Tensor.__setitem__, Tensor.contiguous)


@contextmanager
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A machine with one card, of compute capability 8.0 and 16 GiB."""
    fakes = {
        "_lazy_init": lambda: None,  # which finds no driver
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (8, 0),
        "mem_get_info": lambda device=None: (16 << 30, 16 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    made = Card()
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: made.pin(self))
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's own would stay a Parameter
    try:
        with Calls(), made:
            yield made
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
