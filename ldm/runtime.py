"""What the hardware asks for: device, dtype, layout, memory, threads.

Which kernel is the fastest for given tensors is known where it is called: attention in `models/attention.py`,
group norm in `models/layers.py`, a convolution's gradient in `kernels/convolution.py`.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.kernels.units import cpu_has

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

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
# Numbers that a GPU holds per pixel of a batch, and per channel of the VAE at full size, while it decodes.
GPU_COPIES = 16
# Architectures of AMD's cards that multiply matrices in bf16: CDNA, and RDNA from its third generation on.
AMD_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
# What limits the memory of a container's processes.
CGROUP = Path("/sys/fs/cgroup")
# How running out of memory is told where torch has no exception of its own for it.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory: you tried to allocate",  # the same on Windows
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
)


@dataclass(frozen=True)
class Runtime:
    """Where networks run, and in what precision. The state of a picture is fp32 everywhere."""

    device: torch.device
    dtype: torch.dtype

    def vae_dtype(self, force_upcast: bool) -> torch.dtype:
        """The VAE's dtype: `force_upcast` marks a VAE that overflows in fp16, which bf16 and fp32 do not."""
        if self.dtype is not torch.float16 or not force_upcast:
            return self.dtype
        on_gpu = self.device.type == "cuda"
        return torch.bfloat16 if on_gpu and has_bf16(self.device) else torch.float32

    def place(self, module: M, dtype: torch.dtype | None = None) -> M:
        """Move a module here, ready to draw: evaluation mode, no gradients, laid out as `memory_format`."""
        module.eval().requires_grad_(False)
        module.to(self.device, dtype or self.dtype)
        layout = memory_format(self.device)
        module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack it
        return module

    @property
    def free_memory(self) -> int:
        """Bytes: the system's, or what a container's limit leaves (cgroup v2).

        Of a card what its driver has, and what torch keeps for itself without using it.
        """
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + unused
        import psutil

        free: int = psutil.virtual_memory().available
        names = ("max", "current", "stat")
        try:
            limit, used, stat = ((CGROUP / f"memory.{name}").read_text(encoding="utf-8") for name in names)
            inactive = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)  # cached, given up when asked
            left = int(limit) - int(used) + (int(inactive[1]) if inactive else 0)
        except (OSError, ValueError):  # no such group, or "max": no limit
            return free
        return min(free, max(0, left))

    def images_at_once(self, height: int, width: int, bytes_per_pixel: int = 512) -> int:
        """How many pictures of this size (in pixels) to draw in one batch, at least 1.

        Args:
            bytes_per_pixel: of the VAE's widest features at full size; of SD 1.5 in fp16 256 numbers.
        """
        pixels = CPU_PIXELS
        if self.device.type == "cuda":
            pixels = self.free_memory // (GPU_COPIES * bytes_per_pixel)
        return max(1, pixels // (height * width))


def choose(device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Runtime:
    """The runtime asked for, or the best there is: CUDA, then MPS, then the CPU.

    bf16 is the default where `has_bf16` finds it, fp16 on other GPUs, fp32 on other CPUs.

    Raises:
        UserError: for a device that is not there, and for an unknown device or dtype.
    """
    chosen = _device(device)
    return Runtime(chosen, _default_dtype(chosen) if dtype is None else _dtype(dtype))


def has_bf16(device: torch.device) -> bool:
    """Whether networks are fast in bf16 there. torch also counts cards that only imitate it.

    NVIDIA's have it from compute capability 8.0 on (A100, RTX 30): before, cuDNN has no convolutions in bf16.
    Processors have it with AMX or AVX512-BF16.
    """
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(device).gcnArchName.startswith(AMD_BF16)
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_has("amx_tile", "avx512_bf16")


def half_dtype(device: torch.device) -> torch.dtype:
    """16 bits for what is only looked at there: bf16, but fp16 on cards without it."""
    return torch.float16 if device.type == "cuda" and not has_bf16(device) else torch.bfloat16


def memory_format(device: torch.device) -> torch.memory_format:
    """How networks want pictures and the weights of convolutions: channels_last, but as they are on MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, and not only speaks of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in OUT_OF_MEMORY)


def local_cores() -> int:
    """Processor cores for this process: those of the machine, shared with the run's other processes on it."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most memory used so far, of the GPU or of this process. 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes: what this process has in memory now."""
    import psutil

    held: int = psutil.Process().memory_info().rss
    return held


def set_threads(count: int) -> None:
    """Let networks use `count` processor cores."""
    if count < 1:
        raise UserError(f"threads = {count}: give at least 1; this machine has {os.cpu_count()}")
    torch.set_num_threads(count)


def apart(make: Callable[[], T]) -> T:
    """What `make` gives, made in a thread that ends then; raises what it raises.

    A thread that has computed keeps workers of its own. Where there are more of them than cores, libgomp's no
    longer wait awake between two layers, those of another thread that draws either: a picture of the embedded
    model took half as long again.
    """
    with ThreadPoolExecutor(1, "ldm-apart") as pool:
        return pool.submit(make).result()


class Finite(Generic[M]):
    """A network whose answers are fp32 without NaN or Inf.

    If there are some, the answer is made again with an fp32 copy, which answers from then on: what overflowed
    in one step of a drawing would do so in the next. So one is made for each drawing, and forgotten with it.
    """

    def __init__(
        self, module: M, what: str, gradients: bool = False, unread: list[Tensor] | None = None
    ) -> None:
        """`what` names the network in messages; with `gradients` its answers can be differentiated.

        With `unread` no answer is looked at, as the host would have to wait for a card: each gives a bool
        there, whether it is good, for whoever reads them all at the end, and makes the drawing again.
        """
        self.module, self.what, self.gradients, self.unread = module, what, gradients, unread

    def __call__(self, call: Callable[[M], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`call` of the network. Raises FloatingPointError if fp32 does not help."""
        with torch.set_grad_enabled(self.gradients):
            out = tuple(each.float() for each in call(self.module))
            good = torch.stack([each.isfinite().all() for each in out]).all()
            if self.unread is not None:
                self.unread.append(good)
                return out
            if bool(good):
                return out
            dtype = next(self.module.parameters()).dtype
            if dtype is not torch.float32:
                name = str(dtype)[6:]
                warnings.warn(f"{self.what} gave NaN or Inf in {name}: done again in float32", stacklevel=2)
                self.module = copy.deepcopy(self.module).float()
                out = call(self.module)
                if all(bool(each.isfinite().all()) for each in out):
                    return out
        raise FloatingPointError(
            f"{self.what} gives NaN or Inf, in float32 too: its weights or its input are damaged"
        )


def finite(module: M, call: Callable[[M], tuple[Tensor, ...]], what: str) -> tuple[Tensor, ...]:
    """`Finite` of a single call."""
    return Finite(module, what)(call)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return _device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown: give cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= count.get(chosen.type, 0):
        there = ", ".join(kind for kind, number in count.items() if number)
        raise UserError(f"device {str(device)!r} is not there; this machine has {there}")
    if chosen == torch.device("cuda"):  # with a number, as tensors say it, which are compared with it
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    chosen = DTYPES.get(dtype.lower()) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise UserError(f"dtype {dtype!r} is not supported: give bf16, fp16 or fp32")
    return chosen


def _default_dtype(device: torch.device) -> torch.dtype:
    if has_bf16(device):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16
