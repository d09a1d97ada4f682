"""The parts of a model on another device or in another dtype: new modules, which share what is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.checkpoint import Parts
from ldm.checkpoint.parts import NETWORKS
from ldm.errors import UserError
from ldm.models.copying import copy_network
from ldm.runtime import Runtime, memory_format

M = TypeVar("M", bound=nn.Module)


def read_target(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(device, dtype) of a call like `.to("cuda", torch.float16)`; None is not given. Raises UserError."""
    # diffusers' own options, which change nothing.
    given = {name: value for name, value in kwargs.items() if name != "silence_dtype_warnings"}
    dtype = given.pop("dtype", given.pop("torch_dtype", None))
    device = given.pop("device", None)
    for each in args:
        if isinstance(each, torch.dtype):
            dtype = each
        elif each is not None:
            device = each
    if given or len(args) > 2:
        raise UserError(f"to({', '.join(map(repr, [*args, *given]))}): give a device, a dtype or both")
    return f"cuda:{device}" if isinstance(device, int) else device, dtype


def move_parts(parts: Parts, runtime: Runtime, cast: bool) -> Parts:
    """All networks on the runtime's device, and with `cast` in its dtype."""
    moved: dict[str, Any] = {}
    for name in NETWORKS:
        module = getattr(parts, name)
        if module is not None:
            dtype = runtime.vae_dtype(module.force_upcast) if name == "vae" else runtime.dtype
            moved[name] = move(module, runtime.device, dtype if cast else None)
    return replace(parts, **moved)


def move(module: M, device: torch.device, dtype: torch.dtype | None) -> M:
    """A new tree of modules; tensors that are already so are the very same."""
    layout = memory_format(device)

    def convert(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.device == device and tensor.dtype == wanted:
            return tensor
        kept = layout if tensor.ndim == 4 else torch.preserve_format
        new = tensor.detach().to(device, wanted, memory_format=kept)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    memo = {id(tensor): convert(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return copy_network(module, memo)
