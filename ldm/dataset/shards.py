"""Pictures in WebDataset shards: tars in which each lies beside its caption, for folders that fit no disk.

    shards/000007.tar: cat.jpg, cat.txt (or cat.json with "caption"), dog.jpg, dog.txt, ...

A shard is read through once, from front to back: its pictures are examined as those of a folder are, and it
is noted where each begins. That index is kept. From then on a picture is a place in a shard, on a disk or at
a URL, from which its bytes are read alone. So a training from shards takes the very pictures, in the very
order, of one from a folder, and goes on from any step. The webdataset library streams shards and shuffles
what is in a buffer: the order depends on its workers, and where a run stopped in it is not known.

No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldm.dataset.picture import SUFFIX, THUMB, Fault, PictureInfo, inspect_bytes
from ldm.errors import UserError, printable, reason
from ldm.files import is_url, whole_file
from ldm.runtime import local_cores

FORMAT = 1  # to be raised when an index says something else of the same shard
BESIDE = (".txt", ".caption", ".json")  # files of captions: the first that is there counts
KEYS = ("caption", "text", "prompt")  # of a .json
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Place:
    """Bytes of a shard: a local path or a URL, and which of them."""

    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        """They. Raises UserError."""
        with _shard_errors(self.shard):
            if is_url(self.shard):
                files, path = _filesystem(self.shard)
                data: bytes = files.cat_file(path, start=self.offset, end=self.offset + self.size)
            else:
                with Path(self.shard).open("rb") as file:
                    file.seek(self.offset)
                    data = file.read(self.size)
            if len(data) != self.size:
                raise OSError("it is shorter than when it was indexed")
        return data


@dataclass(frozen=True)
class Member:
    """A picture of a shard: its name there, what it turned out to be, and its caption."""

    name: str
    place: Place
    found: PictureInfo | Fault
    caption: str | None

    @property
    def path(self) -> Path:
        """A name for messages, and to sort by."""
        return Path(self.place.shard, self.name)


# --- which shards ----------------------------------------------------------------------------------------


def find_shards(place: str | Path) -> list[str]:
    """The shards that `place` means, in order; [] where it is none of them, but a folder of pictures.

    Args:
        place: a folder that has .tar files and no pictures at its top; or the path or URL of a .tar, in which
            {000..099} counts.
    """
    if not is_url(place) and Path(place).is_dir():
        files = sorted(path for path in Path(place).iterdir() if not path.name.startswith("."))
        pictures = any(SUFFIX.fullmatch(path.suffix) for path in files)
        return [] if pictures else [str(path) for path in files if path.suffix == ".tar"]
    return list(_counted(str(place))) if str(place).endswith(".tar") else []


def _counted(pattern: str) -> Iterator[str]:
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar."""
    found = RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _counted(f"{pattern[: found.start()]}{number:0{len(first)}}{pattern[found.end() :]}")


# --- what is in them -------------------------------------------------------------------------------------


def read_index(shards: Sequence[str], folder: Path | None = None) -> list[Member]:
    """The pictures of all shards, in their order. Shards that `folder` has no index of are read through.

    Raises UserError naming the shard that cannot be read.
    """
    with ThreadPoolExecutor(local_cores()) as pool:
        return [
            member
            for members in pool.map(lambda shard: _indexed(shard, folder), shards)
            for member in members
        ]


def _indexed(shard: str, folder: Path | None) -> list[Member]:
    kept = None if folder is None else folder / f"{_state(shard)}.json"
    if kept is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # damaged: made again
            return [_member(shard, row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    members = list(_members(shard))
    if kept is not None:
        with whole_file(kept) as aside:
            aside.write_text(json.dumps([_row(member) for member in members]), encoding="utf-8")
    return members


def _state(shard: str) -> str:
    """A name for a shard as it is now: another one once it is written anew."""
    with _shard_errors(shard):
        if is_url(shard):
            files, path = _filesystem(shard)
            info = files.info(path)
            told: Any = [str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime")]
        else:
            stat = Path(shard).stat()
            told = [stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps([FORMAT, shard, told]).encode()).hexdigest()


def _members(shard: str) -> Iterator[Member]:
    """Read a shard through."""
    pictures: dict[str, tuple[str, Place, PictureInfo | Fault]] = {}
    captions: dict[str, dict[str, str | None]] = {}
    with _shard_errors(shard), _opened(shard) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for entry in tar:
            before, slash, name = entry.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            key, suffix = f"{before}{slash}{stem}", f"{dot}{suffix}".lower()
            if not entry.isfile() or not stem:
                continue
            if SUFFIX.fullmatch(suffix) and key not in pictures:
                found = inspect_bytes(io.BytesIO(_content(tar, entry)))
                pictures[key] = entry.name, Place(shard, entry.offset_data, entry.size), found
            elif suffix in BESIDE:
                captions.setdefault(key, {})[suffix] = _caption(suffix, _content(tar, entry))
    for key, (name, place, found) in pictures.items():
        beside = captions.get(key, {})
        caption = next((beside[suffix] for suffix in BESIDE if suffix in beside), None)
        yield Member(name, place, found, caption)


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry)
    data = b"" if file is None else file.read()
    if len(data) != entry.size:
        raise OSError(f"it ends within {entry.name}")
    return data


def _caption(suffix: str, data: bytes) -> str | None:
    """None where it is no text, or says no caption."""
    try:
        text = data.decode("utf-8-sig")
        if suffix == ".json":
            said = json.loads(text)
            text = next(value for name in KEYS if isinstance(value := said.get(name), str))
    except (ValueError, AttributeError, StopIteration):
        return None
    return " ".join(text.split())


def _row(member: Member) -> list[Any]:
    place, found = member.place, member.found
    what = (
        [found.kind, found.text] if isinstance(found, Fault) else [found.digest, found.size, found.oddities]
    )
    return [member.name, place.offset, place.size, member.caption, *what]


def _member(shard: str, row: list[Any]) -> Member:
    name, offset, size, caption, *what = row
    if len(what) == 2:
        found: PictureInfo | Fault = Fault(*what)
    else:
        digest, (height, width), oddities = what
        told = tuple((kind, text) for kind, text in oddities)
        found = PictureInfo(digest, (height, width), told, np.zeros((*THUMB[::-1], 3), np.uint8))
    return Member(name, Place(shard, offset, size), found, caption)


# --- where they lie --------------------------------------------------------------------------------------


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    found: tuple[Any, str] = url_to_fs(url)
    return found


@contextlib.contextmanager
def _opened(shard: str) -> Iterator[IO[bytes]]:
    if is_url(shard):
        files, path = _filesystem(shard)
        with files.open(path, "rb", cache_type="readahead") as file:
            yield file
    else:
        with Path(shard).open("rb") as file:
            yield file


@contextlib.contextmanager
def _shard_errors(shard: str) -> Iterator[None]:
    """Inside the block what goes wrong with a shard is a UserError that names it."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"cannot read {printable(shard)}: {reason(error)}; pip install 'ldm[shards]' for http, and for "
            "other stores the package of fsspec that speaks to them"
        ) from None
    except (OSError, tarfile.TarError, ValueError) as error:
        why = "there is none" if isinstance(error, FileNotFoundError) else printable(reason(error))
        raise UserError(
            f"cannot read the shard {printable(shard)}: {why}; mend it or leave it out, and run the same "
            "command again"
        ) from None
