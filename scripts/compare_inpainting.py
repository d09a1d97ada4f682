"""Does a model trained on masks fill them better than one that they are only put back for?

`python scripts/compare_inpainting.py --trained runs/inpainting/export` (made by `ldm finetune --config
finetune_inpainting` on pictures of scripts/render_postcards.py).
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported
from ldm.postcards.comparisons.arguments import comparison_parser, settings_of, write_figures


def main() -> None:
    sheet = "source, mask, put back, trained"
    parser = comparison_parser(str(__doc__), 300, "pictures of each kind of mask", sheet)
    parser.add_argument("--trained", required=True, help="an inpainting model: a folder, as for txt2img")
    parser.add_argument("--controls", action="store_true", help="with other masks and pictures, too")
    with reported():
        _compare(parser.parse_args())


def _compare(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.postcards.comparisons import inpainting
    from ldm.postcards.scoring.scorer import Scorer
    from ldm.postcards.scoring.sources import picture_size

    pipes = {"put back": load(args.model), "trained on masks": load(args.trained)}
    scorer, settings = Scorer.load(args.scorer), settings_of(args)
    size, cases, figures = picture_size(pipes["put back"]), {}, {}
    for kind in inpainting.KINDS:
        case = inpainting.make_case(kind, args.n, size)
        ways = inpainting.fill(pipes, case, settings, args.controls)
        found = inpainting.measure_filling(scorer, case, ways)
        print(f"{kind}, {len(case.prompts)} pictures", inpainting.HEADER, sep="\n\n")
        print(*(f"| {name} {row}" for name, row in found.items()), "", sep="\n")
        cases[kind], figures[kind] = (case, ways), {name: asdict(row) for name, row in found.items()}
    write_figures(args, figures)
    if args.sheet:
        inpainting.sheet(cases).save(args.sheet, quality=85)


if __name__ == "__main__":
    main()
