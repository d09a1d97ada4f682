"""`ldm bulk`: draw a table of requests into a folder or a bucket, with as many workers as there are."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import add_common_flags, add_model_flags
from ldm.cli.parser import count
from ldm.cli.provenance import add_mark_flags, marks
from ldm.cli.terminal import bar, echo
from ldm.errors import UserError, printable
from ldm.spelling import counted

if TYPE_CHECKING:
    from ldm.bulk.plan import Piece, Plan
    from ldm.bulk.run import Order
    from ldm.bulk.storage import Storage
    from ldm.bulk.worker import Worker
    from ldm.pipeline import Pipeline

BATCH, SHARD, SAMPLE = 8, 1000, 16


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("requests", nargs="+", metavar="FILE", help=".parquet, .jsonl or .csv, or several; also s3://...")
    add("-o", "--out", required=True, metavar="PLACE", help="a folder, or s3://bucket/folder")
    add("--batch", type=count, default=BATCH, metavar="N", help=f"rows drawn together (default: {BATCH})")
    add(
        "--shards",
        type=count,
        nargs="?",
        const=SHARD,
        metavar="N",
        help=f"WebDataset tars of N rows at most in place of files ({SHARD} where no N is given)",
    )
    add("--format", metavar="NAME", help="of pictures: png, jpeg, webp or avif (default: png)")
    add("--quality", type=count, metavar="N", help="of jpeg, webp and avif, 1 to 100")
    add("--lossless", action="store_true", help="of webp")
    add(
        "--verify",
        type=count,
        nargs="?",
        const=SAMPLE,
        metavar="N",
        help=f"draw N random rows of what is done again, and compare ({SAMPLE} where no N is given)",
    )
    add("--retry-failed", action="store_true", help="draw rows again that failed")
    add(
        "--trust-sizes",
        action="store_true",
        help="take files of the right size for done, unread",
    )
    group = parser.add_argument_group("one of several workers (default: as torchrun or Slurm says)")
    group.add_argument("--rank", type=int, metavar="N", help="of this one, from 0")
    group.add_argument("--world", type=count, metavar="N", help="how many there are")
    group = parser.add_argument_group("workers that an engine starts")
    group.add_argument("--engine", choices=list(ENGINES), help="actors of Ray Data, or jobs of Slurm")
    group.add_argument(
        "--workers",
        type=workers,
        default=(1, 1),
        metavar="N",
        help="how many; of ray also such as 1-64, by what there is room for (default: 1)",
    )
    group.add_argument(
        "--slurm",
        nargs="+",
        type=parameter,
        default=[],
        metavar="NAME=VALUE",
        help="of submitit.AutoExecutor: slurm_partition=gpu gpus_per_node=1",
    )
    add_mark_flags(parser.add_argument_group("what pictures say of their origin").add_argument)
    add_model_flags(parser)
    add_common_flags(parser)


def bulk(args: argparse.Namespace) -> int:
    """Rows -> plan -> load -> for each piece of this worker's share: draw, write, note -> finish."""
    if args.engine is not None:
        return by_engine(args)
    order = order_of(args)
    from ldm.bulk.plan import position

    rank, world = position(args.rank, args.world)
    storage, plan = order.storage(f"rank-{rank}"), order.plan()
    share = plan.share(rank, world)
    pieces = counted(len(plan.pieces), *(("batch", "batches") if plan.shard is None else ("shard",)))
    part = f", {len(share)} of them for rank {rank} of {world}" if world > 1 else ""
    rows, kinds = counted(len(plan.rows), "row"), counted(len(plan.rows.models), "kind")
    echo(args, f"{rows} of {kinds}: {pieces}{part}")
    with storage.claimed():
        worker = hired(args, order, plan, storage, share)
        return draw(args, worker, share) if args.verify is None else verify(args, worker)


def order_of(args: argparse.Namespace) -> Order:
    """What the flags ask for. Raises UserError, before anything is read."""
    try:
        import filelock  # noqa: F401
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"bulk drawing needs {error.name}: pip install 'ldm[bulk]'") from None
    from ldm.bulk.run import Order
    from ldm.images.formats import encoding_of

    marked = marks(args)
    if marked.signer is not None:
        raise UserError("a C2PA signature is never the same twice, and no file could be verified: leave it")
    encoding = encoding_of(None, args.format, args.quality, args.lossless)
    return Order(
        tuple(args.requests),
        args.out,
        args.batch,
        args.shards,
        encoding,
        marked,
        args.retry_failed,
        args.trust_sizes,
    )


def hired(
    args: argparse.Namespace, order: Order, plan: Plan, storage: Storage, share: Sequence[Piece]
) -> Worker:
    """A worker with its model, which knows what is done. Raises UserError."""
    import ldm
    from ldm.bulk.mapper import Models
    from ldm.bulk.run import hire
    from ldm.cli.models import load

    args.device = args.device or own_card()

    def read(name: str) -> Pipeline:
        return replace(ldm.load(name, device=args.device, dtype=args.dtype), lora_dir=args.lora_dir)

    models = Models(load(args), read)
    with bar("reading what is done", "files/s", args.quiet) as on_progress:
        return hire(order, plan, storage, models, share, on_progress)


def own_card(environ: Mapping[str, str] = os.environ) -> str | None:
    """The card of one of a machine's workers, as torchrun or Slurm numbers them; None: the default."""
    number = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", ""))
    if not number.isdecimal():
        return None
    import torch

    cards = torch.cuda.device_count()
    return f"cuda:{int(number) % cards}" if cards > 1 else None


def draw(args: argparse.Namespace, worker: Worker, share: Sequence[Piece]) -> int:
    """Draw what is not done, and end the run if this was the last of it. 2: rows failed."""
    left = worker.left(share)
    rows = [worker.plan.rows.ids[i] for piece in left for i in piece.rows]
    todo = sum(row not in worker.done for row in rows)
    with bar("drawing", "pictures/s", args.quiet or not todo, todo) as on_progress:
        worker.on_progress = lambda count: on_progress(worker.drawn + worker.failed, todo)
        worker.draw(left)
    return end(args, worker.storage, worker.plan, worker.drawn)


def end(args: argparse.Namespace, storage: Storage, plan: Plan, drawn: int) -> int:
    """End the run if this was the last of it, and say how it stands. 2: rows failed."""
    from ldm.bulk.finish import FAILED, finish

    ended = finish(storage, plan)
    echo(
        args,
        f"{counted(drawn, 'picture')} drawn, {ended.drawn - drawn} were there: {printable(storage.where)}",
    )
    if ended.missing:
        echo(args, f"{ended.missing} rows are other workers': the last one to end writes manifest.parquet")
    if ended.failed:
        more = "; --retry-failed tries again" if not args.retry_failed else ""
        said = printable(f"{storage.where}/{FAILED}")
        print(f"ldm bulk: rows that failed: {ended.failed}; {said} says why{more}", file=sys.stderr)
    return 2 if ended.failed else 0


def verify(args: argparse.Namespace, worker: Worker) -> int:
    """Draw a sample again; 1 if anything is not as it was."""
    from ldm.bulk import verify as sample

    checked = 0
    faults = 0
    for each in sample.verify(worker, args.verify):
        checked += 1
        faults += bool(each.fault)
        if each.fault:
            print(printable(f"{each.id}: {each.fault}"))
    if not checked:
        raise UserError(f"nothing is done in {worker.storage.where} that could be drawn again")
    echo(args, f"{counted(checked, 'row')} drawn again: {checked - faults} are equal, byte for byte")
    return 1 if faults else 0


# --- workers that an engine starts -----------------------------------------------------------------------


def by_engine(args: argparse.Namespace) -> int:
    """Say what is wrong with the tables, have the rest drawn, and end the run. 2: rows failed."""
    if args.verify is not None or args.rank is not None:
        raise UserError("an engine shares out a whole run: leave --verify, --rank and --world out")
    order = order_of(args)
    storage, plan = order.storage("engine"), order.plan()
    with storage.claimed():
        return end(args, storage, plan, ENGINES[args.engine](args, order, plan, storage))


def by_ray(args: argparse.Namespace, order: Order, plan: Plan, storage: Storage) -> int:
    """Actors draw the pieces of which a row is not done; gives how many pictures they drew."""
    from ldm.bulk import on_ray
    from ldm.bulk.run import known

    with bar("reading what is done", "files/s", args.quiet) as on_progress:
        done = known(order, plan, storage, plan.pieces, on_progress)
    left = plan.left(plan.pieces, done)
    todo, drawn, failed = sum(len(piece.rows) for piece in left), 0, 0
    with bar("drawing", "pictures/s", args.quiet) as on_progress:
        for more, without in on_ray.draw(partial(employed, args), left, args.workers):
            drawn, failed = drawn + more, failed + without
            on_progress(drawn + failed, todo)
    return drawn


@contextmanager
def employed(args: argparse.Namespace, name: str) -> Iterator[Worker]:
    """A worker that an engine has started."""
    order = order_of(args)
    storage, plan = order.storage(name), order.plan()
    with storage.claimed():
        yield hired(argparse.Namespace(**{**vars(args), "quiet": True}), order, plan, storage, ())


def by_slurm(args: argparse.Namespace, order: Order, plan: Plan, storage: Storage) -> int:
    """Jobs are ranks; gives how many pictures they drew."""
    from ldm.bulk import on_slurm
    from ldm.bulk.finish import finish
    from ldm.bulk.storage import WORK

    before = finish(storage, plan).drawn

    folder = Path("ldm-bulk-jobs") if "://" in args.out else Path(args.out) / WORK / "slurm"
    jobs = args.workers[1]
    with bar("jobs of Slurm", "jobs/s", args.quiet) as on_progress:
        for ended in on_slurm.draw(partial(as_rank, args), jobs, folder, dict(args.slurm)):
            on_progress(ended, jobs)
    return finish(storage, plan).drawn - before


def as_rank(args: argparse.Namespace, rank: int, world: int) -> str:
    """Draw as one of several; gives what went wrong, or ""."""
    try:
        bulk(argparse.Namespace(**{**vars(args), "engine": None, "rank": rank, "world": world}))
    except UserError as error:
        return str(error)
    return ""


ENGINES = {"ray": by_ray, "slurm": by_slurm}


def workers(text: str) -> tuple[int, int]:
    """8, or 1-64."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up, nor two such as 1-64")
    return least, most


def parameter(text: str) -> tuple[str, Any]:
    """A name, and a value in YAML: partition=gpu."""
    import yaml

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text} has no value: write such as slurm_partition=gpu")
    return name, yaml.safe_load(value)
