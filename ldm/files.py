"""Files written whole or not at all, with the modes that the user's umask gives; and which file it was."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from ldm.errors import UserError, printable, reason


def is_remote(path: str) -> bool:
    r"""Whether a name leads to another computer: \\host\share, //host/share and mixtures of them."""
    return len(path) > 1 and all(c in "/\\" for c in path[:2])


def weights_folder(name: str) -> Path:
    """Where a folder of weights/ lies, if it is installed."""
    try:
        return Path(str(importlib.resources.files("ldm.weights") / name))
    except ModuleNotFoundError:  # a checkout that is not installed
        return Path(__file__).parents[1] / "weights" / name


def is_url(place: str | Path) -> bool:
    """Whether it names what lies in a store, such as https:// or s3://, and no path of this machine."""
    return "://" in str(place)


def check_drawn_with(path: object, what: str, digest: str, noted: str | None, flag: str = "") -> None:
    """Raise UserError where a file, of that SHA-256, is not the one that a picture's request has noted.

    Args:
        what: it is: "LoRA", "upscaler". flag: by which another is given.
    """
    if noted not in (None, digest):
        advice = f"; give the other one by {flag}" if flag else ""
        raise UserError(
            f"{printable(path)} is not the {what} that this picture was drawn with: its SHA-256 is "
            f"{digest[:10]}..., that was {str(noted)[:10]}...{advice}"
        )


def check_unchanged(path: object, digest: str, noted: str | None, what: str = "file") -> None:
    """Raise UserError where what lies at a path, of that SHA-256, is not what a request asks for."""
    if noted not in (None, digest):
        raise UserError(
            f"{printable(path)} has changed: its SHA-256 begins with {digest[:10]}, but the request asks for "
            f"the {what} with {str(noted)[:10]}"
        )


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Inside the block an OSError is a UserError that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {reason(error)}") from None


# --- writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, to write to and then move; whatever happens, it does not stay.

    Raises OSError.
    """
    temporary = _unused(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by `tempfile`, whose files only their owner can read: this one has the mode of any new file.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write to, which replaces `path` once it is on the disk; on an error nothing changes.

    Raises UserError where it cannot be written.
    """
    with write_errors(path), temporary_file(path) as temporary:
        yield temporary
        _flush([temporary])
        temporary.replace(path)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which replaces `folder` once all is written; on an error nothing changes.

    Raises UserError where it cannot be written.
    """
    temporary = _unused(folder)
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            _flush(path for path in temporary.rglob("*") if path.is_file())
            _replace(folder, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raise UserError if no file can be made in `folder` (or the folder itself); leave nothing behind."""
    absent = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with write_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        finally:
            for parent in absent:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _unused(path: Path) -> Path:
    """A name beside `path` that nobody uses."""
    return path.with_name(f".{path.name[:100]}-{secrets.token_hex(6)}.tmp")


def _replace(folder: Path, new: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.rename(new.with_name(f"{new.name}.old"))
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        # For writing too: Windows flushes no other.
        with contextlib.suppress(OSError), path.open("r+b") as file:
            os.fsync(file.fileno())


# --- which file it was -----------------------------------------------------------------------------------


def sha256(*paths: Path) -> str:
    """64 hex digits: a file's, or of several those of their digests. Read again only if a file has changed.

    Raises OSError.
    """
    states = [(path, path.stat()) for path in paths]
    digests = [_remembered(path, state.st_mtime_ns, state.st_size) for path, state in states]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=256)
def _remembered(path: Path, _mtime_ns: int, _size: int) -> str:
    return read_sha256(path)


def read_sha256(path: Path) -> str:
    """As `sha256` of one file, which is always read: a damaged one may keep its time and size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
