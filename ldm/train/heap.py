"""How a process that trains keeps its memory."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, from here to the end of the process.

    Else glibc gives every large tensor back, and the kernel clears the pages of the next one: a quarter of
    the time of a step that trains all weights on a CPU. Where there is no such setting nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
