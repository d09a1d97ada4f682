"""Objects of a store, such as S3, as the files of a run.

A store has no renaming, and needs none: an upload makes a whole object or nothing. fsspec does the talking,
with the package for the store.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ldm.errors import UserError, printable, reason
from ldm.files import write_errors

# Scheme -> the package that fsspec wants for it.
STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
NOTE_S = 30.0  # a store is told of what is done so often


class Objects:
    """Objects beneath a URL. Endpoint, region and credentials are those of the environment."""

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self.fs, self.root = open_filesystem(self.where)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Nothing is locked: two workers that draw the same row write the same object."""
        yield

    def put(self, name: str, data: bytes) -> None:
        with self._errors("write to", name):
            self.fs.pipe_file(self._path(name), data)

    def put_file(self, name: str, path: Path) -> None:
        with self._errors("write to", name):
            self.fs.put_file(str(path), self._path(name))

    def create(self, name: str, data: bytes) -> bool:
        with self._errors("write to", name):
            try:
                self.fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def get(self, name: str) -> bytes | None:
        with self._errors("read", name), suppress(FileNotFoundError):
            data: bytes = self.fs.cat_file(self._path(name))
            return data
        return None

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(self._path(name), "rb")
        return file

    def digest(self, name: str) -> str | None:
        with self._errors("read", name), suppress(FileNotFoundError), self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return None

    def size(self, name: str) -> int | None:
        with self._errors("read", name), suppress(FileNotFoundError):
            return int(self.fs.info(self._path(name))["size"])
        return None

    def names(self, folder: str) -> list[str]:
        with self._errors("read", folder):
            return sorted(each.removeprefix(f"{self.root}/") for each in self.fs.find(self._path(folder)))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix="ldm-bulk-"))
        try:
            with write_errors(folder):
                yield folder / "shard"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, name: str) -> Uploaded:
        return Uploaded(self, name)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _errors(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store has errors of its own
            raise UserError(f"cannot {doing} {self.where}/{name}: {printable(reason(error))}") from None


class Uploaded:
    """Objects of lines, one after the other: no object can be added to."""

    def __init__(self, store: Objects, name: str) -> None:
        self.store, self.name, self.number = store, name, 0
        self.waiting: list[str] = []
        self.told = time.monotonic()

    def write(self, lines: list[str]) -> None:
        self.waiting += lines
        if time.monotonic() - self.told > NOTE_S:
            self._upload()

    def close(self) -> None:
        self._upload()

    def _upload(self) -> None:
        if self.waiting:
            stem, _, suffix = self.name.rpartition(".")
            data = "".join(f"{line}\n" for line in self.waiting).encode()
            self.store.put(f"{stem}-{self.number:06}.{suffix}", data)
        self.waiting, self.number, self.told = [], self.number + 1, time.monotonic()


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises UserError."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, use_listings_cache=False)  # type: ignore[no-any-return]
    except ImportError:
        raise UserError(
            f"{scheme}:// needs {STORES.get(scheme, 'fsspec')}: pip install it (of s3 by 'ldm[bulk]')"
        ) from None
    except ValueError as error:
        raise UserError(f"cannot open {printable(url)}: {printable(reason(error))}") from None
