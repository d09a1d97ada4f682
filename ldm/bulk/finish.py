"""The end of a run: what all workers noted becomes two tables, in the order of the requests.

    manifest.parquet    each picture: id, file, offset and size in it, SHA-256 of both, width, height, seed
    failed.parquet      each row without one, and why

Whichever worker ends last writes them. Two that do write the same; a second time changes nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.bulk.plan import Plan
from ldm.bulk.records import Record, read_logs
from ldm.bulk.storage import Storage

MANIFEST, FAILED = "manifest.parquet", "failed.parquet"
COLUMNS = ("id", "file", "offset", "size", "sha256", "file_sha256", "width", "height", "seed", "flagged")


@dataclass(frozen=True)
class Ended:
    """How a run stands."""

    drawn: int
    failed: int
    missing: int  # rows that a worker is still to draw


def finish(storage: Storage, plan: Plan) -> Ended:
    """Write both tables if each row is drawn or failed. Raises UserError."""
    ids = plan.rows.ids
    found = read_logs(storage, set(ids))
    drawn = [record for i in ids if (record := found.get(i)) is not None and not record.error]
    failed = [record for i in ids if (record := found.get(i)) is not None and record.error]
    if len(found) == len(ids):
        storage.put(FAILED, table(failed, ("id", "error")))
        storage.put(MANIFEST, table(drawn, COLUMNS))
    return Ended(len(drawn), len(failed), len(ids) - len(found))


def table(records: Sequence[Record], names: Sequence[str]) -> bytes:
    """Columns of records as a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds: dict[str, Any] = {name: pa.string() for name in ("id", "file", "sha256", "file_sha256", "error")}
    kinds |= {name: pa.int64() for name in ("offset", "size", "seed")} | {"flagged": pa.bool_()}
    columns = {
        name: pa.array([getattr(each, name) for each in records], kinds.get(name, pa.int32()))
        for name in names
    }
    data = io.BytesIO()
    parquet.write_table(pa.table(columns), data, compression="zstd")
    return data.getvalue()
