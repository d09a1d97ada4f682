"""Whether what is there is what would be drawn: random rows are drawn again and compared, byte by byte."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm.bulk.mapper import Failed
from ldm.bulk.records import Record
from ldm.bulk.worker import Worker


@dataclass(frozen=True)
class Checked:
    """A row that was drawn again, and what is wrong with the picture that is there: "" for nothing."""

    id: str
    fault: str = ""


def verify(worker: Worker, count: int) -> Iterator[Checked]:
    """Draw `count` random rows of those that are done again, each in the batch that it was drawn in."""
    ids, done = worker.plan.rows.ids, worker.done
    there = [i for i in range(len(ids)) if ids[i] in done and done[ids[i]].file]
    wanted = {*random.sample(there, min(count, len(there)))}
    for piece in worker.plan.pieces:
        for batch in piece.batches:
            chosen = {ids[i] for i in batch if i in wanted}
            if not chosen:
                continue
            for result in worker.mapper(worker.plan.rows_of(batch)):
                if result.row.id in chosen:
                    written = worker.encoded(result)
                    yield Checked(
                        result.row.id,
                        f"it cannot be drawn: {written.reason}"
                        if isinstance(written, Failed)
                        else difference(read(worker, done[result.row.id]), written[1]),
                    )


def read(worker: Worker, record: Record) -> bytes:
    """The bytes of a picture, of a file or within a shard. Raises OSError."""
    with worker.storage.open(record.file) as file:
        file.seek(record.offset)
        return file.read(record.size)


def difference(there: bytes, drawn: bytes) -> str:
    """How two pictures' files differ; "" where they do not."""
    if there == drawn:
        return ""
    try:
        old, new = (np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), int) for data in (there, drawn))
    except Exception:  # broken files make decoders raise anything
        return "its file is damaged"
    if old.shape != new.shape:
        return f"it has {old.shape[1]}x{old.shape[0]} pixels, and {new.shape[1]}x{new.shape[0]} are drawn"
    levels = np.abs(old - new).max(axis=2)
    if not levels.any():
        return "every pixel is equal, and its texts are not"
    return f"{(levels > 0).sum()} of {levels.size} pixels differ, by up to {levels.max()} of 255 levels"
