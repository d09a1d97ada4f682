"""Device, dtype, memory, threads: the only file that knows the hardware."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.errors import UserError

M = TypeVar("M", bound=nn.Module)

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "full": torch.float32,
}

# Pixels drawn in one batch on a CPU: 32 pictures of 128 x 128, two of 512 x 512. More is not faster there.
CPU_PIXELS = 2**19
# Bytes that a GPU needs per pixel of a batch with guidance, mostly while the VAE decodes (SD 1.5, fp16).
GPU_BYTES_PER_PIXEL = 8192


@dataclass(frozen=True)
class Runtime:
    """Where networks run, and in what precision. The state of a picture is fp32 everywhere."""

    device: torch.device
    dtype: torch.dtype

    def vae_dtype(self, force_upcast: bool) -> torch.dtype:
        """The VAE's dtype: `force_upcast` marks a VAE that overflows in fp16, which bf16 and fp32 do not."""
        if self.dtype is not torch.float16 or not force_upcast:
            return self.dtype
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32

    def place(self, module: M, dtype: torch.dtype | None = None) -> M:
        """Move a module here, ready to draw: evaluation mode, no gradients, convolutions channels_last."""
        module.eval().requires_grad_(False)
        module.to(self.device, dtype or self.dtype)
        layout = torch.contiguous_format if self.device.type == "mps" else torch.channels_last
        module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack it
        return module

    def images_at_once(self, height: int, width: int) -> int:
        """How many pictures of this size (in pixels) to draw in one batch, at least 1."""
        pixels = CPU_PIXELS
        if self.device.type == "cuda":
            pixels = torch.cuda.mem_get_info(self.device)[0] // GPU_BYTES_PER_PIXEL
        return max(1, pixels // (height * width))


def choose(device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Runtime:
    """The runtime asked for, or the best there is: CUDA, then MPS, then the CPU.

    bf16 is the default on a CPU with AMX or AVX512-BF16 and on a GPU that has it, fp16 on other GPUs, fp32
    on other CPUs.

    Raises:
        UserError: for a device that is not there, and for an unknown device or dtype.
    """
    chosen = _device(device)
    return Runtime(chosen, _default_dtype(chosen) if dtype is None else _dtype(dtype))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most memory used so far, of the GPU or of this process. 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def set_threads(count: int) -> None:
    """Let networks use `count` processor cores."""
    if count < 1:
        raise UserError(f"threads = {count}: give at least 1; this machine has {os.cpu_count()}")
    torch.set_num_threads(count)


def finite(module: M, call: Callable[[M], tuple[Tensor, ...]], what: str) -> tuple[Tensor, ...]:
    """`call(module)` as fp32 without NaN or Inf; if there are some, made again with an fp32 copy.

    Raises:
        FloatingPointError: if fp32 does not help. `what` names the network in messages.
    """
    with torch.no_grad():
        out = tuple(each.float() for each in call(module))
        if all(bool(each.isfinite().all()) for each in out):
            return out
        dtype = next(module.parameters()).dtype
        if dtype is not torch.float32:
            warnings.warn(f"{what} gave NaN or Inf in {str(dtype)[6:]}: done again in float32", stacklevel=2)
            out = call(copy.deepcopy(module).float())
            if all(bool(each.isfinite().all()) for each in out):
                return out
    raise FloatingPointError(f"{what} gives NaN or Inf, in float32 too: its weights or its input are damaged")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown: give cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= count.get(chosen.type, 0):
        there = ", ".join(kind for kind, number in count.items() if number)
        raise UserError(f"device {str(device)!r} is not there; this machine has {there}")
    return chosen


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    chosen = DTYPES.get(dtype.lower()) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise UserError(f"dtype {dtype!r} is not supported: give bf16, fp16 or fp32")
    return chosen


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return torch.float16 if device.type == "mps" else torch.float32
