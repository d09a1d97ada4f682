"""What outlives the server: pictures as PNGs, and an index of them and of jobs in SQLite.

The PNGs are the truth. When the server starts, the index is made to agree with the folder, and jobs that
waited or were being drawn become `interrupted`: whoever asks for one is told.

    FOLDER/pictures/20261128/20261128T032450-5f0c1d2e3a4b-0.png
    FOLDER/uploads/SHA256.png
    FOLDER/index.sqlite
"""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.errors import UserError, reason
from ldm.files import check_writable
from ldm.images.png import save_new
from ldm.images.provenance import MARKED, Marks
from ldm.images.texts import read_own
from ldm.request import Request
from ldm.serve.queue import STOPPED
from ldm.serve.ticket import State, Ticket, as_json

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (
    id TEXT PRIMARY KEY, path TEXT, created REAL, width INTEGER, height INTEGER, prompt TEXT, request TEXT,
    mtime INTEGER, size INTEGER);
CREATE INDEX IF NOT EXISTS newest ON pictures (created, id);
CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, created REAL, status TEXT, told TEXT);
CREATE INDEX IF NOT EXISTS newest_jobs ON jobs (created, id);
"""
JOBS = 10_000  # that are remembered
log = logging.getLogger("ldm.serve")


@dataclass(frozen=True)
class Kept:
    """A picture of the gallery."""

    id: str
    path: Path
    created: float
    width: int
    height: int
    request: dict[str, Any] | None  # None for a file that says none

    def as_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("id", "created", "width", "height", "request")}
        return {**told, "url": f"/api/pictures/{self.id}.png"}


class Store:
    """A folder of pictures with its index. Threads may share it. Raises UserError if it cannot be written."""

    def __init__(self, folder: Path, marks: Marks = MARKED) -> None:
        """`marks`: what pictures say of their origin."""
        self.marks = marks
        self.folder, self.pictures, self.uploads = folder, folder / "pictures", folder / "uploads"
        check_writable(folder)
        for each in (self.pictures, self.uploads):
            each.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = open_index(folder / "index.sqlite")
        self.interrupted = self._interrupt()
        self.rebuild()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # --- pictures ---

    def keep(self, ticket: Ticket, image: Picture, request: Request) -> str:
        """Write a finished picture; gives its id. Raises UserError."""
        name = f"{ticket.id}-{len(ticket.pictures)}"
        path = self.pictures / name[:8] / f"{name}.png"
        path = save_new(image, path, request, marks=self.marks)
        self._add(path, request.to_json(), image.size)
        return path.stem

    def get(self, name: str) -> Kept | None:
        """The picture of an id, if it is there."""
        if not NAME.fullmatch(name):
            return None
        found = self._rows("SELECT * FROM pictures WHERE id = ?", (name,))
        return next((each for each in map(self._kept, found) if is_own(each.path, self.pictures)), None)

    def page(self, limit: int, before: str | None = None, search: str = "") -> tuple[list[Kept], str | None]:
        """Pictures, the newest first, and what to give as `before` for the next page; None at the end.

        Raises UserError for a `before` that no page gave.
        """
        where: list[str] = ["instr(lower(coalesce(prompt, '')), ?)"]
        values: list[Any] = [search.lower()]
        if before is not None:
            where, values = [*where, "(created, id) < (?, ?)"], [*values, *read_place(before)]
        query = f"SELECT * FROM pictures WHERE {' AND '.join(where)} ORDER BY created DESC, id DESC LIMIT ?"
        found = [self._kept(row) for row in self._rows(query, (*values, limit + 1))]
        if len(found) <= limit:
            return found, None
        last = found[limit - 1]
        return found[:limit], f"{last.created!r}~{last.id}"

    def remove(self, name: str) -> bool:
        """Delete a picture; False if it is not there."""
        found = self.get(name)
        if found is None:
            return False
        found.path.unlink(missing_ok=True)
        self._write("DELETE FROM pictures WHERE id = ?", (name,))
        return True

    @property
    def count(self) -> int:
        return int(self._rows("SELECT count(*) FROM pictures", ())[0][0])

    def rebuild(self) -> None:
        """Make the index agree with the folder: files that changed are read again, by their heads."""
        known = {row[0]: row[1:] for row in self._rows("SELECT id, path, mtime, size FROM pictures", ())}
        found = {path.stem: path for path in self._files()}
        for name, path in found.items():
            state = path.stat()
            if known.get(name) != (self._relative(path), state.st_mtime_ns, state.st_size):
                try:
                    with Image.open(path, formats=("PNG",)) as image:
                        size = image.size
                except Exception as error:  # broken files make decoders raise anything
                    log.warning("%s is left out: %s", path.name, reason(error))
                    continue
                self._add(path, read_own(path), size, state.st_mtime)
        for name in known.keys() - found.keys():
            self._write("DELETE FROM pictures WHERE id = ?", (name,))

    def _files(self) -> Iterator[Path]:
        """The PNGs of the folder; no links, and no names that no URL would have."""
        for path in sorted(self.pictures.rglob("*.png")):
            if NAME.fullmatch(path.stem) and is_own(path, self.pictures):
                yield path

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _add(
        self, path: Path, request: str | None, size: tuple[int, int], created: float | None = None
    ) -> None:
        try:
            prompt = None if request is None else json.loads(request).get("prompt")
        except (ValueError, RecursionError, AttributeError):
            request = prompt = None
        state = path.stat()
        values = (path.stem, self._relative(path), created or time.time(), *size, prompt, request)
        self._write(
            "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, state.st_mtime_ns, state.st_size),
        )

    def _kept(self, row: tuple[Any, ...]) -> Kept:
        name, path, created, width, height, _, request, _, _ = row
        told = None if request is None else json.loads(request)
        return Kept(name, self.folder / path, created, width, height, told)

    # --- jobs ---

    def note(self, ticket: Ticket) -> None:
        """Write down how a job is, for whoever asks after a restart."""
        told = json.dumps(as_json(ticket))
        self._write(
            "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?)",
            (ticket.id, ticket.created, ticket.state.value, told),
        )

    def job(self, name: str) -> dict[str, Any] | None:
        """What was noted of a job."""
        rows = self._rows("SELECT told FROM jobs WHERE id = ?", (name,))
        return json.loads(rows[0][0]) if rows else None

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The newest first."""
        rows = self._rows("SELECT told FROM jobs ORDER BY created DESC, id DESC LIMIT ?", (limit,))
        return [json.loads(told) for (told,) in rows]

    def _interrupt(self) -> int:
        """Jobs that an earlier server left; gives how many. Their finished pictures are in the folder."""
        going = (State.QUEUED.value, State.GENERATING.value)
        rows = self._rows("SELECT id, told FROM jobs WHERE status IN (?, ?)", going)
        for name, told in rows:
            there = sorted(path.stem for path in self._files() if path.stem.rpartition("-")[0] == name)
            changed = {"status": State.INTERRUPTED.value, "error": STOPPED, "finished": time.time()}
            text = json.dumps(json.loads(told) | changed | {"pictures": there, "queue_position": None})
            self._write(
                "UPDATE jobs SET status = ?, told = ? WHERE id = ?", (State.INTERRUPTED.value, text, name)
            )
        keep = "DELETE FROM jobs WHERE id NOT IN (SELECT id FROM jobs ORDER BY created DESC LIMIT ?)"
        self._write(keep, (JOBS,))
        return len(rows)

    # --- the index ---

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _write(self, query: str, values: tuple[Any, ...]) -> None:
        try:
            with self._lock, self._db:
                self._db.execute(query, values)
        except sqlite3.OperationalError as error:  # the disk is full, most often
            raise UserError(f"cannot write to {self.folder}: {error}") from None


def open_index(path: Path) -> sqlite3.Connection:
    """The index, or an empty one in place of one that is damaged, which is kept beside it."""
    try:
        return _open(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise UserError(f"cannot open {path}: {error} (is another server at it?)") from None
        log.warning("%s is damaged and kept as %s.damaged: jobs are forgotten, pictures are not", path, path)
        path.replace(path.with_name(f"{path.name}.damaged"))
        for suffix in ("-wal", "-shm"):
            path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)
        return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, timeout=1)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # two servers would tell each other's jobs wrong
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(SCHEMA)
        db.execute("SELECT count(*) FROM pictures").fetchone()
        db.execute("PRAGMA user_version = 1")  # a write, which takes the lock
    except BaseException:
        db.close()
        raise
    return db


def read_place(text: str) -> tuple[float, str]:
    """Where a page of the gallery ended. Raises UserError."""
    created, _, name = text.partition("~")
    try:
        return float(created), name
    except ValueError:
        raise UserError(f"before {text!r:.60} is not allowed: give what the last page said") from None


def is_own(path: Path, folder: Path) -> bool:
    """An ordinary file that lies there itself, whatever links there are on the way."""
    return path.is_file() and not path.is_symlink() and path.resolve().is_relative_to(folder.resolve())
