"""Rows in, results out: what an engine maps over batches. It knows no files, no ranks, and nothing of a run.

A row that cannot be drawn fails alone, with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from ldm.bulk.rows import Row, seed_of
from ldm.errors import UserError, printable
from ldm.images.pixels import to_pil
from ldm.pipeline.deciding.prepare import prepare
from ldm.pipeline.job import Batch, Job
from ldm.pipeline.sample import draw_batch
from ldm.request import Request
from ldm.request.as_json import fields_of
from ldm.runtime import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Pipeline


@dataclass(frozen=True)
class Drawn:
    """A picture, with the request that draws it alone."""

    row: Row
    image: Image
    request: Request


@dataclass(frozen=True)
class Failed:
    """Why there is none."""

    row: Row
    reason: str


Result = Drawn | Failed


class Models:
    """The models of rows: the run's own, and one at a time of those that rows name.

    Args:
        read: gives the pipeline of a path or a name. Raises UserError.
    """

    def __init__(self, own: Pipeline, read: Callable[[str], Pipeline]) -> None:
        self.own, self._read = own, read
        self._other: tuple[str, Pipeline] | None = None

    def __call__(self, name: str | None) -> Pipeline:
        if name in (None, self.own.name):
            return self.own
        assert name is not None
        if self._other is None or self._other[0] != name:
            self._other = None  # before the next one is read: two may not fit
            self._other = name, self._read(name)
        return self._other[1]


@dataclass(frozen=True)
class Mapper:
    """Draws the rows of one batch of a plan, which differ in texts and seeds only."""

    models: Models

    def __call__(self, rows: Sequence[Row]) -> Iterator[Result]:
        """A result for each row, in any order."""
        requests = list[tuple[Row, Request]]()
        for row in rows:
            try:
                requests.append((row, request_of(row)))
            except UserError as error:
                yield Failed(row, printable(error))
        if requests:
            yield from self._draw(requests)

    def _draw(self, asked: Sequence[tuple[Row, Request]]) -> Iterator[Result]:
        try:
            job = self._prepare(asked)
        except Exception as error:
            if len(asked) == 1:
                yield Failed(asked[0][0], why(error))
                return
            good = list[tuple[Row, Request]]()
            for each in asked:
                try:
                    self._prepare([each])
                    good.append(each)
                except Exception as error:
                    yield Failed(each[0], why(error))
            # Where each can be prepared and all together cannot, they are no batch.
            parts = [good] if len(good) < len(asked) else [[each] for each in good]
            for part in parts:
                if part:
                    yield from self._draw(part)
            return
        rows = [row for row, _ in asked]
        # Not the job's own batches: how many those have depends on the memory that is free.
        for _, pictures in groupby(job.pictures, lambda picture: job.encode.length(picture.prompt)):
            batch = tuple(pictures)
            for some in [(each,) for each in batch] if job.sampler.alone else [batch]:
                yield from draw(job, some, rows)

    def _prepare(self, asked: Sequence[tuple[Row, Request]]) -> Job:
        pipe = self.models(asked[0][1].model)
        for _, request in asked:
            if request.model_hash not in (None, pipe.model_hash):
                raise UserError(
                    f"this asks for the model {request.model} ({request.model_hash}), not {pipe.name} "
                    f"({pipe.model_hash}): leave model_hash out, or give that model"
                )
        alone = [request.replace(model=None, model_hash=None) for _, request in asked]
        return prepare(pipe, alone, batch_size=1)


def request_of(row: Row) -> Request:
    """What a row asks for; where it gives no seed, or a negative one, that follows from its id.

    Raises UserError.
    """
    fields = fields_of({k: v for k, v in json.loads(row.fields).items() if not is_no_seed(k, v)})
    if isinstance(seed := fields.get("seeds"), float) and seed.is_integer():  # of a column with gaps
        fields["seeds"] = (int(seed),)
    request = Request(**{"seeds": (seed_of(row.id),), **fields})
    if request.num_images != 1:
        raise UserError("a row is one picture: give it one seed, and a row of its own to each other")
    return request


def is_no_seed(name: str, value: object) -> bool:
    return name == "seeds" and isinstance(value, int | float) and value < 0


def draw(job: Job, batch: Batch, rows: Sequence[Row]) -> Iterator[Result]:
    """The pictures of one batch; of one that fails, each alone."""
    try:
        drawn = draw_batch(job, batch)
        images = to_pil(drawn.images)
    except Exception as error:
        if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
            raise  # the card is lost to this process, and no row is to blame
        if len(batch) == 1:
            yield Failed(rows[batch[0].prompt], why(error))
            return
        for picture in batch:
            yield from draw(job, (picture,), rows)
        return
    for image, picture in zip(images, drawn.batch, strict=True):
        yield Drawn(rows[picture.prompt], image, picture.request)


def why(error: Exception) -> str:
    """An error in one line of the user's words."""
    line = str(error).partition("\n")[0]
    if is_out_of_memory(error):
        return "not enough memory for this picture: ask for a smaller one"
    if isinstance(error, UserError | FloatingPointError):
        return printable(line)
    return printable(f"{type(error).__name__}: {line}")
