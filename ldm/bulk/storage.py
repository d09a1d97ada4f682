"""Where the files of a run lie: a folder, or an object store (`ldm.bulk.objects`).

No half of a file ever has its name: here one is written to `.work/WORKER/`, flushed and renamed.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from ldm.bulk.objects import STORES, Objects
from ldm.errors import UserError, printable, reason
from ldm.files import check_writable, read_sha256, temporary_file, write_errors

WORK = ".work"
T = TypeVar("T")
ABANDONED_S = 24 * 3600  # a file that nobody has written to for so long is nobody's


class Log(Protocol):
    """Lines that one worker adds, and nobody changes."""

    def write(self, lines: list[str]) -> None: ...
    def close(self) -> None: ...


class Storage(Protocol):
    """Files by their names, which are relative and have /. All raise UserError for what does not work."""

    where: str

    def put(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; one that is there is replaced."""

    def put_file(self, name: str, path: Path) -> None:
        """The same with a file of this machine, which may be moved."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name; whether it was written."""

    def get(self, name: str) -> bytes | None:
        """A whole file; None where there is none."""

    def open(self, name: str) -> IO[bytes]:
        """To read from any place of it. Raises FileNotFoundError."""

    def digest(self, name: str) -> str | None:
        """The SHA-256 of a file, which is read; None where there is none."""

    def size(self, name: str) -> int | None:
        """In bytes, without reading it; None where there is no such file."""

    def names(self, folder: str) -> list[str]:
        """The files beneath a folder, sorted."""

    def scratch(self) -> Any:
        """A context with a new file of this machine, for `put_file`."""

    def log(self, name: str) -> Log: ...

    def claimed(self) -> Any:
        """A context in which no other process may be this worker, as far as that can be known."""


def open_storage(place: str, worker: str) -> Storage:
    """The storage of a folder or a URL, for the worker of that name. Raises UserError."""
    scheme, found, _ = place.partition("://")
    if not found:
        return Folder(Path(place), worker)
    if scheme == "file":
        return Folder(Path(place.removeprefix("file://")), worker)
    if scheme not in STORES:
        known = ", ".join(f"{each}://" for each in STORES)
        raise UserError(
            f"{printable(place)} is not allowed: give a folder, or {known} (others may leave half a file)"
        )
    return Objects(place)


# --- a folder -------------------------------------------------------------------------------------------


class Folder:
    """A folder, which several workers may share, over a network too."""

    def __init__(self, place: Path, worker: str) -> None:
        self.where, self.place, self.work = str(place), place, place / WORK / worker

    @contextmanager
    def claimed(self) -> Iterator[None]:
        from ldm.train.lock import only_run

        check_writable(self.place)
        with only_run(self.work):
            for path in (self.place / WORK).glob("*/.*.tmp"):
                with suppress(OSError):
                    if path.parent == self.work or time.time() - path.stat().st_mtime > ABANDONED_S:
                        path.unlink()
            yield

    def put(self, name: str, data: bytes) -> None:
        with self._written(name) as path:
            path.write_bytes(data)

    def put_file(self, name: str, path: Path) -> None:
        with write_errors(self.place / name):
            flush(path)
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(self.place / name)

    def create(self, name: str, data: bytes) -> bool:
        final = self.place / name
        with write_errors(final), temporary_file(self.work / final.name) as path:
            path.write_bytes(data)
            flush(path)
            try:
                os.link(path, final)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if final.exists():
                    return False
                path.replace(final)
        return True

    def get(self, name: str) -> bytes | None:
        return self._read(name, Path.read_bytes)

    def open(self, name: str) -> IO[bytes]:
        return (self.place / name).open("rb")

    def digest(self, name: str) -> str | None:
        return self._read(name, read_sha256)

    def size(self, name: str) -> int | None:
        return self._read(name, lambda path: path.stat().st_size)

    def names(self, folder: str) -> list[str]:
        found = (self.place / folder).rglob("*")
        return sorted(path.relative_to(self.place).as_posix() for path in found if path.is_file())

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with write_errors(self.work), temporary_file(self.work / "shard") as path:
            yield path

    def log(self, name: str) -> Log:
        return Appended(self.place / name)

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        final = self.place / name
        with write_errors(final), temporary_file(self.work / final.name) as path:
            yield path
            flush(path)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)

    def _read(self, name: str, how: Callable[[Path], T]) -> T | None:
        try:
            return how(self.place / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {self.place / name}: {reason(error)}") from None


def new_name() -> str:
    """A name that no other process has."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"


def flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


class Appended:
    """A file that lines are added to. One that was being written when its process died is no whole line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, lines: list[str]) -> None:
        with write_errors(self.path):
            self.file.write("".join(f"{line}\n" for line in lines))
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said
            self.file.close()
