"""What is known of rows: each worker adds lines to a log of its own, and all logs together say what is done.

A record is of a picture that lies under its final name, or of a row that failed. Of several for one row the
latest counts. Done is what a record says and its file proves: there, with the same SHA-256.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from ldm.bulk.storage import Storage

LOGS = "log"
READERS = 16  # files that are read at once: of an object store each takes a while to come


@dataclass(frozen=True)
class Record:
    """Of one row.

    Attributes:
        file: that holds the picture; "": there is none, for the reason that `error` says.
        offset: of the picture's bytes in the file.
        sha256: of the picture's bytes; file_sha256: of the whole file, a shard's for one.
        flagged: by a safety checker; None: it was not looked at.
        time: of the record, in seconds since 1970.
    """

    id: str
    file: str = ""
    offset: int = 0
    size: int = 0
    sha256: str = ""
    file_size: int = 0
    file_sha256: str = ""
    width: int = 0
    height: int = 0
    seed: int = 0
    flagged: bool | None = None
    error: str = ""
    time: float = field(default_factory=time.time)

    def line(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value not in ("", None)})


def read_logs(storage: Storage, ids: Collection[str]) -> dict[str, Record]:
    """The latest record of each row of `ids` that has one."""
    found: dict[str, Record] = {}
    for record in _records(storage) if ids else ():
        if record.id in ids and (record.id not in found or found[record.id].time <= record.time):
            found[record.id] = record
    return found


def _records(storage: Storage) -> Iterator[Record]:
    names = [name for name in storage.names(LOGS) if name.endswith(".jsonl")]
    with ThreadPoolExecutor(READERS) as pool:
        for data in pool.map(storage.get, names):
            # What comes after the last end of a line was being written when its process died.
            for line in (data or b"").split(b"\n")[:-1]:
                try:
                    yield Record(**json.loads(line))
                except (ValueError, TypeError):  # half a line, after which a full disk had room again
                    continue


def proven(
    storage: Storage,
    records: Iterable[Record],
    by_size: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Record]:
    """Those records whose file is there and has its SHA-256; or only its size, without reading it."""
    by_file: dict[str, list[Record]] = {}
    for record in records:
        if record.file:
            by_file.setdefault(record.file, []).append(record)

    def holds(name: str) -> list[Record]:
        said = by_file[name]
        if by_size:
            size = storage.size(name)
            return [each for each in said if each.file_size == size]
        digest = storage.digest(name)
        return [each for each in said if each.file_sha256 == digest]

    found: dict[str, Record] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for k, held in enumerate(pool.map(holds, by_file), 1):
            found.update((each.id, each) for each in held)
            on_progress(k, len(by_file))
    return found
