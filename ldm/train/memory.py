"""Memory of a process that trains: less of it by gradient checkpointing, and kept until it is used again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.models.attention import SpatialTransformer
from ldm.models.layers import ResnetBlock

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
# What glibc has from the start; its thresholds then grow to these where large blocks are freed (mallopt(3)).
MMAP_MAX, LARGEST_MMAP_THRESHOLD = 65536, 32 << 20


def checkpoint_blocks(unet: nn.Module) -> None:
    """Make the U-Net's resnets and transformers keep only their inputs for the backward pass.

    What is inside them is computed again there: the same gradients from about a third more work (Chen et al.
    2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174). Without gradients nothing
    changes; a second call changes nothing.
    """
    for module in unet.modules():
        # An attribute of the module itself hides its class's forward.
        if isinstance(module, (ResnetBlock, SpatialTransformer)) and "forward" not in vars(module):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block the C library keeps what is freed; at its end it gives all of it back.

    Else glibc gives every large tensor back, and the kernel clears the pages of the next one: a quarter of
    the time of a step that trains all weights on a CPU. Where there is no such setting nothing is done.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, MMAP_MAX)
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        trim(0)
