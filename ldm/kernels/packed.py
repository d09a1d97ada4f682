"""Weights in the order in which a kernel reads them: made once, outside the modules, gone with the weight."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import psutil
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.kernels import native
from ldm.kernels.malloc import give_back

# Of the memory that is free, the share that all packed weights may take.
SHARE = 1 / 4


@dataclass(frozen=True)
class _Packed:
    packed: Tensor
    version: int  # of the weight that it was made of
    address: int


_KEPT = WeakTensorKeyDictionary()
_LOCK = threading.Lock()


def winograd(weight: Tensor) -> Tensor | None:
    """`native.pack_winograd` of a weight, kept for as long as the weight lives and stays what it is.

    None where memory is short, and of a tensor of inference mode, which does not count its changes.
    """
    if weight.is_inference():
        return None
    now = (weight._version, weight.data_ptr())
    found: _Packed | None = _KEPT.get(weight)  # type: ignore[no-untyped-call]
    if found is not None and (found.version, found.address) == now:
        return found.packed
    if nbytes() + 4 * 4 * weight.numel() > psutil.virtual_memory().available * SHARE:
        return None
    packed = native.pack_winograd(weight)
    give_back()  # small blocks that stay would hold all that is free below them in the heap
    with _LOCK:
        _KEPT[weight] = _Packed(packed, *now)
    return packed


def nbytes() -> int:
    """What all that is kept takes, in bytes."""
    with _LOCK:
        kept: list[_Packed] = list(_KEPT.values())  # type: ignore[no-untyped-call]
    return sum(each.packed.nbytes for each in kept)
