"""What a run is: all that decides bits, noted in `run.json` by its first worker.

A worker that would draw other bits than the first one is refused. An engine makes one `Order`, gives it to
its workers, which `hire` themselves and draw the pieces they are given, and calls `finish` at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.adapters.adapted import find_lora
from ldm.bulk.mapper import Mapper, Models
from ldm.bulk.plan import Piece, Plan
from ldm.bulk.records import Record, proven, read_logs
from ldm.bulk.rows import read_rows
from ldm.bulk.storage import Storage, open_storage
from ldm.bulk.worker import Worker
from ldm.errors import UserError, printable
from ldm.files import sha256
from ldm.images.formats import PNG, Encoding
from ldm.images.provenance import MARKED, Marks
from ldm.version import __version__

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

NAME = "run.json"
# What is noted -> as it is called in an error.
TOLD = {
    "ldm": "ldm",
    "torch": "torch",
    "device": "device",
    "dtype": "dtype",
    "requests": "requests",
    "rows": "rows",
    "batch": "--batch",
    "shards": "--shards",
    "format": "format",
    "marks": "marks of origin",
    "model_hash": "model",
    "models": "models of rows",
    "adapters": "LoRAs and embeddings",
    "beside": "networks beside the model",
}


@dataclass(frozen=True)
class Order:
    """What is asked for, the same in all workers of a run; it can be sent to other machines.

    Attributes:
        requests: tables, by names or URLs. out: a folder, or the URL of one.
        batch, shard: as of `Plan`.
        retry_failed: whether rows that failed are drawn again.
        trust_sizes: whether a file of the right size is done, without being read.
    """

    requests: tuple[str, ...]
    out: str
    batch: int
    shard: int | None = None
    encoding: Encoding = PNG
    marks: Marks = MARKED
    retry_failed: bool = False
    trust_sizes: bool = False

    def plan(self) -> Plan:
        """Raises UserError for what is wrong with the tables."""
        return Plan.of(read_rows(self.requests), self.batch, self.shard)

    def storage(self, worker: str) -> Storage:
        """Raises UserError."""
        return open_storage(self.out, worker)


def hire(
    order: Order,
    plan: Plan,
    storage: Storage,
    models: Models,
    share: Sequence[Piece] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Worker:
    """A worker of a run, which begins if it has not. It knows what is done of its share.

    Of other pieces it takes nothing for done: they are drawn again and come out the same.

    Args:
        on_progress: sees how many files of the share have been read.

    Raises:
        UserError: if the run was begun with anything that gives other bits.
    """
    begin(storage, noted(order, plan, models))
    done = known(order, plan, storage, share, on_progress)
    return Worker(plan, storage, Mapper(models), done, order.encoding, order.marks)


def known(
    order: Order,
    plan: Plan,
    storage: Storage,
    share: Sequence[Piece],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Record]:
    """By id, records of rows of a share that need no drawing: their files are there, or they failed."""
    ids = {plan.rows.ids[i] for piece in share for i in piece.rows}
    records = read_logs(storage, ids)
    done = proven(storage, records.values(), order.trust_sizes, on_progress)
    if not order.retry_failed:
        done |= {row: record for row, record in records.items() if record.error}
    return done


def noted(order: Order, plan: Plan, models: Models) -> dict[str, Any]:
    """What decides the bits of a run. Raises UserError for a model of rows that is not there."""
    pipe, adapted = models.own, models.own.adapted
    named = [name for name in dict.fromkeys(plan.rows.models) if name not in (None, pipe.name)]
    return {
        "ldm": __version__,
        "torch": str(torch.__version__),
        "device": device_of(pipe),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "requests": plan.rows.digest,
        "rows": len(plan.rows),
        "batch": order.batch,
        "shards": order.shard,
        "format": [order.encoding.format, order.encoding.quality, order.encoding.lossless],
        "marks": [order.marks.on, order.marks.producer],
        "model_hash": pipe.model_hash,
        "models": {str(name): models(name).model_hash for name in named},
        "adapters": [
            *([use.name, use.weight, use.text_weight, use.sha256] for use in adapted.uses),
            *([each.name, each.sha256] for each in adapted.embeddings),
            *([name, lora_sha256(name, pipe.lora_dir)] for name in sorted(plan.rows.loras)),
        ],
        "beside": {
            "upscaler": None if pipe.upscaler is None else pipe.upscaler.model_hash,
            "refiner": None if pipe.refiner is None else pipe.refiner.model_hash,
            "classifier": None if pipe.classifier is None else pipe.classifier.sha256,
            "safety_checker": None if pipe.safety_checker is None else pipe.safety_checker.sha256,
        },
    }


def device_of(pipe: Pipeline) -> str:
    """What rounds sums in its own way: a card's name, or a processor's instructions and how many threads."""
    if pipe.device.type == "cuda":
        return str(torch.cuda.get_device_name(pipe.device))
    if pipe.device.type == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return pipe.device.type


def lora_sha256(name: str, folder: Path) -> str | None:
    """Of the LoRA that rows name; None where there is none: those rows will say so."""
    try:
        return sha256(find_lora(name, folder))
    except (UserError, OSError):
        return None


def begin(storage: Storage, run: Mapping[str, Any]) -> None:
    """Note the run, or find it noted. Raises UserError where another one is."""
    if storage.create(NAME, json.dumps(run, indent=2).encode()):
        return
    was = read_run(storage)
    for name, called in TOLD.items():
        if was.get(name) != (now := json.loads(json.dumps(run[name]))):
            raise UserError(
                f"{printable(storage.where)} was begun with {called} {told(was.get(name))}, this worker has "
                f"{told(now)}: make them agree, or give another --out"
            )


def read_run(storage: Storage) -> dict[str, Any]:
    """What is noted. Raises UserError where nothing is, and for what cannot be read."""
    data = storage.get(NAME)
    try:
        run = json.loads(data or b"")
        if isinstance(run, dict):
            return run
    except ValueError:
        pass
    raise UserError(f"{printable(storage.where)}/{NAME} cannot be read: it is no run of ldm bulk")


def told(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
