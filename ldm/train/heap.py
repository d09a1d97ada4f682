"""How a process that trains keeps its memory."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, from here to the end of the process.

    Else every large tensor is new memory, whose pages the kernel clears one by one: a third of the time of a
    step that trains all weights on a CPU. Where the C library is another one, nothing is done.
    """
    if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
