"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.errors import UserError


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` inside the block. The system lets go of it when the process ends, however it ends.

    Raises UserError saying who holds it, or why it cannot be held.
    """
    note = run_dir / ".lock.json"  # beside the lock, which others may not read on Windows
    lock = FileLock(run_dir / ".lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run_dir} is in use by {_holder(note)}: wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror or error}") from None
    try:
        now = datetime.now().isoformat(" ", "seconds")
        note.write_text(
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}), encoding="utf-8"
        )
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _holder(note: Path) -> str:
    try:
        held = json.loads(note.read_text(encoding="utf-8"))
        return f"process {held['pid']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError):  # it has only just begun
        return "another process"
