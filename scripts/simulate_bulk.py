"""Bulk drawing on 1 to 1,000 workers, simulated from what one was measured to take.

`python scripts/simulate_bulk.py docs/scale/measured.json --pictures 1000000 --charts docs/scale` prints the
table of docs/scale.md and draws its curves. Flags from --life on are what no measurement here can tell.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.bulk.capacity import Assumed
from ldm.errors import reported

# Charts stand alone as files: a page's colours do not reach into them.
PAPER = '<svg style="background:#fff;color:#24292f" '


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("measured", type=Path, help="JSON of scripts/measure_bulk.py")
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32, 100, 320, 1000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--charts", type=Path, help="write speed.svg and share.svg into this folder")
    for field in fields(Assumed):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    with reported():
        _simulate(parser.parse_args())


def _simulate(args: argparse.Namespace) -> None:
    from ldm.bulk import capacity

    measured = capacity.read_measured(args.measured)
    assumed = Assumed(**{field.name: getattr(args, field.name) for field in fields(Assumed)})
    print(f"{args.pictures} pictures: {measured.what}\n{assumed}\n\n{capacity.HEADER}")
    outcomes = capacity.sweep(args.pictures, args.workers, measured, assumed, args.seed)
    for k, _ in enumerate(args.workers):
        for name, line in outcomes.items():
            print(capacity.row(name, line[k], measured))
    if args.charts:
        speeds = capacity.speeds(outcomes, measured)
        shares = capacity.shares(outcomes, measured)
        _write(args.charts / "speed.svg", speeds, "workers", "Pictures a second")
        _write(args.charts / "share.svg", shares, "workers", "Per cent of a perfect speed")


def _write(path: Path, series: dict[str, list[tuple[float, float]]], along: str, label: str) -> None:
    from ldm.evaluate.chart import curves
    from ldm.files import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(curves(series, along, label).replace("<svg ", PAPER, 1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
