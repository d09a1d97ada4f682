"""Weights that are in memory only while they are used.

A network that is loaded `asleep` has parameters of the right shape, layout and dtype whose storages are
empty. `in_use` and calls of the network fill them from the file: all of them, after others have left, or
layer by layer, each for the time of its call. A storage comes and goes while its parameter stays the same
object: whatever shares it (LoRAs beside a layer, seamless copies) finds it filled too. accelerate's hooks put
other parameters into the modules that they know, which those would not see.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ldm.checkpoint.fill import filled_by, is_finite, laid_out, let_go
from ldm.errors import UserError
from ldm.kernels.malloc import give_back

# Whose weights come together where layers come and go; else each layer with weights by itself.
UNITS = ("ResnetBlock", "TransformerBlock", "CLIPEncoderLayer")


class Stay(Enum):
    """How long the weights of a network are in memory."""

    ALWAYS = "always"
    WHILE_USED = "while used"  # until another network is used
    BY_LAYER = "by layer"  # each layer's for the time of its call


class Sleeping(nn.Parameter):
    """A parameter whose storage is empty until it is woken. Nothing but its shape may be asked before."""

    source: Tensor  # pages of the file
    origin: str  # the file and the tensor's name in it
    checked: bool

    @classmethod
    def of(cls, source: Tensor, origin: str, dtype: torch.dtype, device: torch.device) -> Self:
        kept = dtype if source.is_floating_point() else source.dtype
        with torch.inference_mode(False):
            empty = laid_out(torch.empty(source.numel(), dtype=kept, device=device), source.shape)
            made = cls(empty, requires_grad=False)
        empty.untyped_storage().resize_(0)
        made.source, made.origin, made.checked = source, origin, False
        return made

    @property
    def is_awake(self) -> bool:
        return self.untyped_storage().nbytes() > 0

    def wake(self) -> None:
        """Read the file, where that is not done. Raises UserError for NaN and Inf, the first time."""
        if self.is_awake:
            return
        self.untyped_storage().resize_(self.nbytes)
        self.detach().copy_(self.source)
        let_go(self.source)
        if not self.checked and not is_finite(self.detach()):
            raise UserError(f"{self.origin} holds NaN or Inf in {str(self.dtype)[6:]}")
        self.checked = True

    def sleep(self) -> None:
        self.untyped_storage().resize_(0)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Sleeping({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter with the same numbers."""
        awake = self.is_awake
        self.wake()
        memo[id(self)] = copied = nn.Parameter(self.detach().clone(), requires_grad=False)
        if not awake:
            self.sleep()
        return copied


class Home:
    """Where the weights of one network are while it sleeps; it is shared by copies that share its tensors."""

    def __init__(self, tensors: Iterable[Sleeping]) -> None:
        self.tensors, self.stay = list(tensors), Stay.WHILE_USED

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def wake(self) -> None:
        for each in self.tensors:
            each.wake()

    def sleep(self) -> None:
        for each in self.tensors:
            each.sleep()


_LOCK = threading.RLock()  # one network at a time, whatever thread wants it
_HERE: list[Home] = []  # those whose weights are in memory


@contextmanager
def asleep(device: torch.device) -> Iterator[None]:
    """Inside the block networks are loaded without their weights, to be on `device`."""

    def put_to_sleep(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, dtype: Any) -> None:
        made = {
            name: Sleeping.of(t, f"{path}: tensor {name}", dtype or t.dtype, device)
            for name, t in tensors.items()
        }
        module.load_state_dict(made, assign=True)
        home = Home(made.values())
        module.home = home  # type: ignore[assignment]  # found by `home_of`
        _add_hooks(module, home)

    with filled_by(put_to_sleep):
        yield


def home_of(module: nn.Module) -> Home | None:
    """Of a network that was loaded asleep."""
    return cast("Home | None", getattr(module, "home", None))


@contextmanager
def in_use(*modules: nn.Module | None) -> Iterator[None]:
    """Inside the block one of these networks after the other is used, and by no other thread.

    A network that is called comes by itself; one whose layers are called one by one, a VAE, if it is alone.
    """
    homes = [home for module in modules if module is not None and (home := home_of(module)) is not None]
    if not homes:
        yield
        return
    with _LOCK:
        if len(modules) == 1:
            _come(homes[0])
        yield


def _come(home: Home) -> None:
    """Have the weights of one network in memory, or none of them where they come by layer."""
    if home.stay is not Stay.ALWAYS:
        leave(but=home)
    if home.stay is Stay.BY_LAYER:
        home.sleep()
    else:
        home.wake()
    if home not in _HERE:
        _HERE.append(home)


@contextmanager
def awake(tensor: Tensor) -> Iterator[None]:
    """Inside the block a single weight can be read, whether it sleeps or not."""
    slept = isinstance(tensor, Sleeping) and not tensor.is_awake
    with _LOCK if slept else nullcontext():
        if isinstance(tensor, Sleeping):
            tensor.wake()
        yield
        if slept and isinstance(tensor, Sleeping):
            tensor.sleep()


def leave(but: Home | None = None) -> None:
    """Let the weights of all networks go that came by themselves, but of one."""
    with _LOCK:
        going = [home for home in _HERE if home is not but]
        for home in going:
            home.sleep()
            _HERE.remove(home)
        if going:
            give_back()


def largest_layer(module: nn.Module) -> int:
    """Bytes of the weights that come together where they come by layer."""
    return max((sum(each.nbytes for each in own) for _, own in _units(module)), default=0)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[Tensor]]]:
    """The modules whose weights come together, and those weights: each weight once."""
    if type(module).__name__ in UNITS:
        yield module, list(module.parameters())
        return
    if own := list(module.parameters(recurse=False)):
        yield module, own
    for child in module.children():
        yield from _units(child)


def _add_hooks(module: nn.Module, home: Home) -> None:
    def begin(*_: Any) -> None:
        _LOCK.acquire()
        _come(home)

    module.register_forward_pre_hook(begin)
    # Also where the network fails, or what comes before it.
    module.register_forward_hook(lambda *_: _LOCK.release(), always_call=True)
    for unit, own in _units(module):
        tensors = [each for each in own if isinstance(each, Sleeping)]
        unit.register_forward_pre_hook(_hook(home, tensors, "wake"))
        unit.register_forward_hook(_hook(home, tensors, "sleep"), always_call=True)


def _hook(home: Home, tensors: list[Sleeping], what: str) -> Callable[..., None]:
    """A function, and so the same one in copies of its module."""

    def call(*_: Any) -> None:
        if home.stay is Stay.BY_LAYER:
            for each in tensors:
                getattr(each, what)()

    return call
