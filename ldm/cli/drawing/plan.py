"""`txt2img --plan`: what a drawing takes of memory, and how it fits; a warning where it does not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipeline import Job


def table(job: Job, args: argparse.Namespace) -> Iterator[str]:
    """The lines that tell of one job: what takes what, the peak of each way, and what to do."""
    from ldm.memory.sizes import as_text, parse_size
    from ldm.memory.trace import loaded_by_tracing
    from ldm.pipeline.deciding.plan import WAYS
    from ldm.pipeline.deciding.prepare import plan_of
    from ldm.runtime import resident_memory

    def row(what: str, size: float, note: str = "") -> str:
        return f"  {what:<28}{as_text(size):>12}  {note}".rstrip()

    free = job.model.runtime.free_memory
    own = resident_memory() if job.model.device.type != "cuda" else 0
    room = free + own if args.max_memory is None else min(parse_size(args.max_memory), free + own)
    plan = plan_of(job, room)
    if args.max_memory is None:  # then the drawing traces nothing
        plan.base -= loaded_by_tracing()
    first, request = plan.predict(WAYS[0]), job.request
    yield f"{len(job.batches[0])} x {request.width}x{request.height}, {str(job.model.dtype)[6:]}"
    yield row("python and libraries", first.base)
    yield from (row(f"weights: {name}", size) for name, size in plan.weights.items())
    for stage in first.stages:
        yield row(stage.name, stage.beside, "most" if stage is first.worst else "")
    yield row("there is", room, "free" if args.max_memory is None else "allowed by --max-memory and free")
    for way in WAYS:
        predicted = plan.predict(way)
        fits = "fits" if predicted.peak <= room else "does not fit"
        yield row(f"peak, {way.name}", predicted.peak, fits)
    try:
        way = plan.choose().way
        ask = (
            "" if way is WAYS[0] or args.max_memory is not None else f": give --max-memory {room // 2**20}MiB"
        )
        yield f"fits: {way.name}{ask}"
    except UserError as error:
        yield f"does not fit: {error}"


def warn_of_memory(jobs: Sequence[Job]) -> None:
    """Say on stderr where a job will not fit into the memory that is free, and which way would."""
    from ldm.memory.sizes import as_text
    from ldm.pipeline.deciding.plan import WAYS
    from ldm.pipeline.deciding.prepare import plan_of
    from ldm.runtime import resident_memory

    for job in jobs:
        free = job.model.runtime.free_memory
        weights = sum(each.nbytes for each in job.model.unet.parameters())
        room = free + (resident_memory() if job.model.device.type != "cuda" else weights)
        plan = plan_of(job, room)
        if (whole := plan.predict(WAYS[0]).peak) <= room:
            continue
        try:
            advice = f"--max-memory {room // 2**20}MiB draws it ({plan.choose().way.name})"
        except UserError:
            advice = " or ".join(plan.advice())
        print(
            f"this will take about {as_text(whole)} of memory, and {as_text(room)} are there: {advice}",
            file=sys.stderr,
        )
        return
