"""What one worker does: it draws pieces, writes what they give, and notes what is written.

Pictures of a batch are encoded and written by threads while the next batch is drawn.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import time as now

from ldm.bulk.mapper import Drawn, Failed, Mapper, Result
from ldm.bulk.plan import Piece, Plan
from ldm.bulk.records import LOGS, Record
from ldm.bulk.shards import OldShard, add_row, shard_name
from ldm.bulk.storage import Log, Storage, new_name
from ldm.errors import UserError, printable
from ldm.files import read_sha256
from ldm.images.formats import PNG, Encoding
from ldm.images.png import as_bytes
from ldm.images.provenance import MARKED, Marks

WRITERS = 8  # threads
FOLDER_ROWS = 1000  # whose pictures lie in one folder


@dataclass
class Worker:
    """Draws pieces of a plan into a storage. What cannot be written ends it with a UserError.

    Args:
        done: by id, records of rows that need no drawing: `proven` ones, and of rows that failed.
    """

    plan: Plan
    storage: Storage
    mapper: Mapper
    done: dict[str, Record]
    encoding: Encoding = PNG
    marks: Marks = MARKED
    on_progress: Callable[[int], object] = lambda rows: None  # sees how many more are done
    drawn: int = field(default=0, init=False)
    failed: int = field(default=0, init=False)

    def left(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces of which a row is not done."""
        return self.plan.left(pieces, self.done)

    def draw(self, pieces: Iterable[Piece]) -> list[Record]:
        """Draw what is not done; gives the new records, which are in the log too."""
        new, left = list[Record](), self.left(pieces)
        if not left:
            return new
        with self._log() as log, ThreadPoolExecutor(WRITERS, "ldm-write") as pool, Behind() as behind:
            note = partial(self._note, log, new)
            for piece in left:
                if self.plan.shard is None:
                    for batch in piece.batches:
                        results = list(self.mapper(self.plan.rows_of(batch)))
                        behind(partial(self._write_files, batch, results, pool, note))
                else:
                    self._draw_shard(piece, behind, pool, note)
        return new

    @contextmanager
    def _log(self) -> Iterator[Log]:
        log = self.storage.log(f"{LOGS}/{new_name()}.jsonl")
        try:
            yield log
        finally:
            log.close()

    def _note(self, log: Log, new: list[Record], records: Sequence[Record]) -> None:
        """What lies under its final name now, and what failed."""
        log.write([record.line() for record in records])
        fresh = [record for record in records if record.id not in self.done]
        self.done.update((record.id, record) for record in records)
        self.drawn += sum(not record.error for record in fresh)
        self.failed += sum(bool(record.error) for record in fresh)
        new += records
        self.on_progress(len(fresh))

    # --- each picture a file ---

    def _write_files(
        self,
        batch: Sequence[int],
        results: Sequence[Result],
        pool: ThreadPoolExecutor,
        note: Callable[[Sequence[Record]], None],
    ) -> None:
        folders = {self.plan.rows.ids[i]: f"pictures/{i // FOLDER_ROWS:05}" for i in batch}
        missing = [each for each in results if each.row.id not in self.done]
        note(list(pool.map(lambda each: self._write_file(each, folders[each.row.id]), missing)))

    def _write_file(self, result: Result, folder: str) -> Record:
        written = self.encoded(result)
        if isinstance(written, Failed):
            return Record(written.row.id, error=written.reason)
        drawn, data = written
        name = f"{folder}/{drawn.row.id}{self.encoding.suffix}"
        self.storage.put(name, data)
        record = record_of(drawn, data)
        return replace(record, file=name, file_size=record.size, file_sha256=record.sha256)

    def encoded(self, result: Result) -> tuple[Drawn, bytes] | Failed:
        """A result with its picture's file."""
        if isinstance(result, Failed):
            return result
        try:
            return result, as_bytes(result.image, result.request, self.encoding, self.marks)
        except UserError as error:  # its format cannot hold it
            return Failed(result.row, printable(error))

    # --- pictures in a shard ---

    def _draw_shard(
        self,
        piece: Piece,
        behind: Behind,
        pool: ThreadPoolExecutor,
        note: Callable[[Sequence[Record]], None],
    ) -> None:
        """A whole shard anew: batches that are done are copied, if an older one holds them."""
        name, records = shard_name(piece.number), list[Record]()
        with self.storage.scratch() as path:
            with ExitStack() as opened:
                shard = opened.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT))
                old = None
                if any(record.file for record in self._done(piece.rows)):
                    file = opened.enter_context(self.storage.open(name))
                    old = OldShard(opened.enter_context(tarfile.open(fileobj=file)))
                for batch in piece.batches:
                    done = self._done(batch)
                    if old is not None and len(done) == len(batch):
                        behind(partial(self._copy, old, shard, done, records))
                    else:
                        results = list(self.mapper(self.plan.rows_of(batch)))
                        behind(partial(self._add, shard, results, pool, records))
                behind.wait()
            if any(record.size for record in records):
                whole = {"file": name, "file_size": path.stat().st_size, "file_sha256": read_sha256(path)}
                self.storage.put_file(name, path)
                records = [replace(each, **whole) if each.size else each for each in records]
        note(records)

    def _done(self, rows: Iterable[int]) -> list[Record]:
        ids = self.plan.rows.ids
        return [self.done[ids[i]] for i in rows if ids[i] in self.done]

    def _copy(
        self, old: OldShard, shard: tarfile.TarFile, done: Sequence[Record], records: list[Record]
    ) -> None:
        for record in done:
            if record.file:
                offset = add_row(shard, record.id, old.members(record.id))[self.encoding.suffix]
                records.append(replace(record, offset=offset, time=now()))

    def _add(
        self,
        shard: tarfile.TarFile,
        results: Sequence[Result],
        pool: ThreadPoolExecutor,
        records: list[Record],
    ) -> None:
        for written in pool.map(self.encoded, results):
            if isinstance(written, Failed):
                records.append(Record(written.row.id, error=written.reason))
                continue
            drawn, data = written
            members = {
                self.encoding.suffix: data,
                ".json": drawn.request.to_json().encode(),
                ".txt": drawn.request.shown.encode(),
            }
            offset = add_row(shard, drawn.row.id, members)[self.encoding.suffix]
            records.append(replace(record_of(drawn, data), offset=offset))


def record_of(drawn: Drawn, data: bytes) -> Record:
    """Of a picture and its file, wherever that will lie."""
    return Record(
        id=drawn.row.id,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        width=drawn.image.width,
        height=drawn.image.height,
        seed=drawn.request.seeds[0],
        flagged=drawn.request.nsfw_content_detected,
    )


class Behind:
    """Does one thing in a thread while the next is made ready. Its errors come out of the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "ldm-behind")
        self._doing: Future[None] | None = None

    def __call__(self, do: Callable[[], None]) -> None:
        self.wait()
        self._doing = self._pool.submit(do)

    def wait(self) -> None:
        if self._doing is not None:
            doing, self._doing = self._doing, None
            doing.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()
