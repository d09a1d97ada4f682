"""What one process of bulk drawing takes: starting, drawing a batch, saving a picture; what Ray Data adds.

`python scripts/measure_bulk.py docs/scale/measured.json --ray` on a quiet machine: scripts/simulate_bulk.py
reads it. With --cpu it counts the process's own time instead, for a machine that is not quiet.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="JSON")
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--device")
    parser.add_argument("--batches", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="count the process's own time")
    parser.add_argument("--ray", action="store_true", help="measure Ray Data, too, by two actors")
    with reported():
        _measure(parser.parse_args())


def _measure(args: argparse.Namespace) -> None:
    import psutil

    import ldm
    from ldm.bulk import measuring
    from ldm.bulk.mapper import Models
    from ldm.bulk.run import Order, hire
    from ldm.files import whole_file
    from ldm.runtime import set_threads

    set_threads(args.threads)
    clock = time.process_time if args.cpu else time.time
    began = 0.0 if args.cpu else psutil.Process().create_time()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "requests.jsonl"
        measuring.write_table(table, args.batches * args.batch, args.steps)
        order = Order((str(table),), str(Path(folder) / "out"), args.batch)
        pipe = ldm.load(args.model, device=args.device)
        worker = hire(order, order.plan(), order.storage("measured"), Models(pipe, ldm.load))
        what = f"{pipe.name}, {args.steps} steps, {pipe.device}, {args.threads} threads"
        measured = measuring.measure(worker, what, clock() - began, clock)
    if args.ray:
        measured = replace(measured, dispatch=measuring.dispatch(2))
    with whole_file(args.out) as temporary:
        temporary.write_text(json.dumps(asdict(measured)) + "\n", encoding="utf-8")
    mean = sum(measured.service) / len(measured.service)
    print(f"{what}: {measured.start:.2f} s to start, {mean:.3f} s a batch of {args.batch}")


if __name__ == "__main__":
    main()
