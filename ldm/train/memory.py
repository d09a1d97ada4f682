"""Memory of a process that trains: less of it by gradient checkpointing, and kept where it was freed."""

from __future__ import annotations

import ctypes
import sys
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.models.attention import SpatialTransformer
from ldm.models.layers import ResnetBlock

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


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


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, from here to the end of the process.

    Else glibc gives every large tensor back, and the kernel clears the pages of the next one: a quarter of
    the time of a step that trains all weights on a CPU. Where there is no such setting nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
