"""Does a ControlNet of edges keep to them, and the picture still to its prompt?

`python scripts/compare_control.py --control runs/control/export` (made by `ldm train-control --config
finetune_postcard_control` on pictures of scripts/render_postcards.py).
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported
from ldm.postcards.comparisons.arguments import comparison_parser, settings_of, write_figures


def main() -> None:
    sheet = "edges, without, with, autoencoder"
    parser = comparison_parser(str(__doc__), 300, "pictures of each way", sheet)
    parser.add_argument("--control", required=True, help="the ControlNet: a folder, as for txt2img")
    parser.add_argument("--preprocess", default="canny", help="what it was trained with")
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0], help="of the control")
    with reported():
        _compare(parser.parse_args())


def _compare(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.postcards.comparisons import control
    from ldm.postcards.scoring.scorer import Scorer
    from ldm.postcards.scoring.sources import picture_size

    pipe = load(args.model).with_controlnet(args.control)
    scorer, settings = Scorer.load(args.scorer), settings_of(args)
    case = control.make_case(args.n, picture_size(pipe), args.preprocess)
    ways = control.draw_ways(pipe, args.control, case, settings, args.strength)
    found = control.measure_keeping(scorer, case, ways, args.preprocess)
    print(control.HEADER, *(f"| {name} {row}" for name, row in found.items()), sep="\n")
    write_figures(args, {name: asdict(row) for name, row in found.items()})
    if args.sheet:
        control.sheet(case, ways).save(args.sheet, quality=85)


if __name__ == "__main__":
    main()
