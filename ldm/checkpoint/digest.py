"""Which file it was: SHA-256, taken once."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


def sha256(*paths: Path) -> str:
    """64 hex digits: a file's, or of several those of their digests. Read again only if a file has changed.

    Raises OSError.
    """
    states = [(path, path.stat()) for path in paths]
    digests = [_digest(path, state.st_mtime_ns, state.st_size) for path, state in states]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
