"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmark import environment, worker
from benchmark.case import MODELS, QUICK, ROWS, Case
from benchmark.folders import folder_of
from benchmark.inputs import config_of, downscale_of
from benchmark.measure import measure
from benchmark.peers import peers_on
from benchmark.peers.base import Peer
from benchmark.processes import once
from benchmark.report import ROOT, write_report
from benchmark.results import Results

QUICK_ROUNDS = 3


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--quick", action="store_true", help="small sizes, three rounds: five minutes on two slow cores")
    add("--list", action="store_true", help="tell rows and peers, and which of them are missing")
    models = f"{', '.join(MODELS)}, or pipeline folders (default: all)"
    add("--models", nargs="+", metavar="NAME", help=models)
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"{', '.join(ROWS)} (default: the model's)")
    add("--skip-rows", nargs="+", choices=ROWS, default=[], metavar="ROW")
    add("--peers", nargs="+", metavar="NAME", help="(default: all that suit the machine; see --list)")
    add("--skip-peers", nargs="+", default=[], metavar="NAME")
    add("--rounds", type=int, help="medians are of so many (default: 5)")
    add("--size", type=int, metavar="PIXELS", help="side of the pictures (default: the model's)")
    add("--steps", type=int, help="of whole pictures (default: 20; of the embedded model 8)")
    add("--batch", type=int, help="pictures at once in the row `batch`")
    add("--train-batch", type=int, default=4, help="pictures of 256 x 256 in a step of training")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, help="cores for each peer (default: what each takes by itself)")
    add("--cache", type=Path, default=Path.home() / ".cache" / "ldm-bench", help="for what is made once")
    add("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    add("--name", help="of the report's files (default: date and processor)")
    for hidden in ("--inside", "--peer", "--case"):
        add(hidden, help=argparse.SUPPRESS)
    add("--path", type=Path, default=Path(), help=argparse.SUPPRESS)
    return made


def main(description: str) -> None:
    args = parser(description).parse_args()
    if args.inside:
        worker.main(args.inside, args.peer, Case.from_json(args.case), args.path)
        return
    if args.list:
        list_all(args.device)
        return
    started = time.perf_counter()
    told = {"command": command_line(), **environment.describe(args.device)}
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else 5)
    told["rounds"] = args.rounds
    name, done = args.name or report_name(told), list[Results]()

    def write(so_far: Sequence[Results]) -> Path:
        told["load_average_after"] = environment.load_average()
        return write_report(args.out, name, told, so_far)

    for model in args.models or (QUICK if args.quick else MODELS):
        case, rows = case_of(args, model)
        peers = chosen_peers(args)
        tell = partial(print, flush=True)
        done.append(measure(case, rows, peers, args.rounds, tell, lambda now: write([*done, now])))
    page = write(done)
    print(f"{page.read_text(encoding='utf-8')}\n{page} in {(time.perf_counter() - started) / 60:.1f} min")


def case_of(args: argparse.Namespace, model: str) -> tuple[Case, list[str]]:
    """A model at the sizes asked for, its folder made if need be, and its rows."""
    known = MODELS.get(model, MODELS["sd15"])
    side, rows = QUICK.get(model, (known.side, known.rows)) if args.quick else (known.side, known.rows)
    cache = str(args.cache.resolve())
    name = model if model in MODELS else re.sub(r"\W+", "-", str(Path(model).resolve())).strip("-")
    empty = Case(model, "", cache, 0, 0, 0)
    try:
        folder = folder_of(model, args.cache)
    except FileNotFoundError as error:
        sys.exit(str(error))
    if not folder.exists():
        print(f"{model}: making a folder of random weights, once: {folder}", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        once("folder", "-", empty, folder, folder.with_name("folder.log"))
    case = Case(
        model=name,
        folder=str(folder),
        cache=cache,
        height=args.size or side,
        width=args.size or side,
        steps=args.steps or known.steps,
        batch=args.batch or known.batch,
        training=args.train_batch,
        device=args.device,
        threads=args.threads,
    )
    if model not in MODELS and not args.size:
        side = config_of(case, "unet")["sample_size"] * downscale_of(config_of(case, "vae"))
        case = Case.from_json(json.dumps({**vars(case), "height": side, "width": side}))
    case.made.mkdir(parents=True, exist_ok=True)
    wanted = args.rows or rows
    if args.device != "cpu":  # our training is measured on processors only
        wanted = [row for row in wanted if not ROWS[row].apart]
    return case, [row for row in wanted if row not in args.skip_rows]


def chosen_peers(args: argparse.Namespace) -> list[Peer]:
    """Those asked for; else all, but for those that take long and tell little.

    These are bf16 on a processor that only imitates it, and on a card beside fp16, and with --quick what is
    compiled or converted at length.
    """
    there = peers_on(args.device)
    unknown = sorted({*(args.peers or ()), *args.skip_peers} - there.keys())
    if unknown:
        sys.exit(f"no such peer: {', '.join(unknown)}; there are {', '.join(there)}")
    chosen = [there[name] for name in args.peers] if args.peers else [*there.values()]
    if not args.peers and not (args.device == "cpu" and environment.has_bf16()):
        print("peers in bf16 are left out here: on a card fp16 is measured, and this processor imitates bf16")
        chosen = [peer for peer in chosen if peer.dtype != "bf16"]
    if not args.peers and args.quick:
        chosen = [peer for peer in chosen if not peer.compiled and peer.dtype != "int8"]
    return [peer for peer in chosen if peer.name not in args.skip_peers]


def list_all(device: str) -> None:
    for row in ROWS.values():
        print(f"{row.name:10} {next(iter(row.figures.values())).title}")
    print()
    case = Case("postcard", str(folder_of("postcard", Path())), "", 0, 0, 0)
    for name, peer in peers_on(device).items():
        print(f"{name:26} {peer.lacks(case) or 'is there'}")


def report_name(told: dict[str, object]) -> str:
    """2026-11-27-amd-epyc-2-cores."""
    processor = told["processor"]
    assert isinstance(processor, dict)
    machine = told.get("graphics_card") or f"{processor['name']} {processor['cores']} cores"
    return f"{str(told['date'])[:10]}-{re.sub(r'[^a-z0-9]+', '-', str(machine).lower()).strip('-')}"


def command_line() -> str:
    return f"python scripts/bench.py {shlex.join(sys.argv[1:])}".rstrip()
