"""What the C library (glibc) does with memory that is freed: keep it for the next tensor, or give it back."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import NamedTuple

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
# What glibc has from the start; its thresholds then grow to these where large blocks are freed (mallopt(3)).
MMAP_MAX, LARGEST_MMAP_THRESHOLD = 65536, 32 << 20
SMALLEST_MAPPED = 4 << 20  # bytes of a block that is given back, inside `freed_memory_given_back`


class _Malloc(NamedTuple):
    mallopt: Callable[[int, int], int]
    trim: Callable[[int], int]


Settings = tuple[tuple[int, int], ...]  # arguments of mallopt
AS_EVER: Settings = (
    (M_MMAP_MAX, MMAP_MAX),
    (M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD),
    (M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD),
)
_BLOCKS: list[Settings] = []  # that are open, in this thread and others
_LOCK = threading.Lock()


def give_back() -> None:
    """What is freed and still kept, now."""
    if (malloc := _malloc()) is not None:
        malloc.trim(0)


@cache
def _malloc() -> _Malloc | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    return None if mallopt is None or trim is None else _Malloc(mallopt, trim)


def freed_memory_kept() -> AbstractContextManager[None]:
    """Inside the block the C library keeps what is freed; at its end it gives all of it back.

    Else glibc gives every large tensor back, and the kernel clears the pages of the next one: a quarter of
    the time of a step that trains all weights on a CPU. Where there is no such setting nothing is done.
    """
    return _block((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))  # none mapped; never trimmed


def freed_memory_given_back() -> AbstractContextManager[None]:
    """Inside the block the C library gives every block of 4 MiB back as soon as it is freed.

    Else glibc keeps those of up to 32 MB, and what is held among them leaves holes that nothing fits into: a
    map made band by band took seven times its size.
    """
    return _block((M_MMAP_MAX, MMAP_MAX), (M_MMAP_THRESHOLD, SMALLEST_MAPPED))


@contextmanager
def _block(*settings: tuple[int, int]) -> Iterator[None]:
    """Settings of the whole process; at the end those of the blocks that are still open hold again."""
    malloc = _malloc()
    if malloc is None:
        yield
        return
    with _LOCK:
        _BLOCKS.append(settings)
        _set(malloc, settings)
    try:
        yield
    finally:
        with _LOCK:
            _BLOCKS.remove(settings)
            for each in (AS_EVER, *_BLOCKS):
                _set(malloc, each)
        malloc.trim(0)


def _set(malloc: _Malloc, settings: Settings) -> None:
    for option, value in settings:
        malloc.mallopt(option, value)
