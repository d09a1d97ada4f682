"""Does an IP-Adapter take from a reference picture what it shows, and does the text still count beside it?

`python scripts/compare_image_prompt.py --adapter runs/reference/export/ip_adapter.safetensors` (made by `ldm
train-image-prompt --config finetune_postcard_image_prompt` on pictures of scripts/render_postcards.py).
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported
from ldm.postcards.comparisons.arguments import comparison_parser, settings_of, write_figures


def main() -> None:
    parser = comparison_parser(str(__doc__), 200, "references", "the reference, and each text's two")
    parser.add_argument("--adapter", required=True, help="the IP-Adapter's file")
    parser.add_argument("--image-encoder", default="weights/postcard-eval/image_encoder", help="its folder")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.5, 1.0], help="of the image prompt")
    with reported():
        _compare(parser.parse_args())


def _compare(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.postcards.comparisons import image_prompt
    from ldm.postcards.scoring.scorer import Scorer
    from ldm.postcards.scoring.sources import picture_size

    pipe, scorer = load(args.model), Scorer.load(args.scorer)
    case = image_prompt.make_case(args.n, picture_size(pipe))
    adapter = {"file": args.adapter, "image_encoder": args.image_encoder}
    ways = image_prompt.draw_ways(pipe, case, adapter, settings_of(args), args.strength)
    found = image_prompt.measure(scorer, case, ways)
    rows = [(f"{text}, {name}", row) for text, own in found.items() for name, row in own.items()]
    print(image_prompt.HEADER, *(f"| {name} {row}" for name, row in rows), sep="\n")
    write_figures(args, {name: asdict(row) for name, row in rows})
    if args.sheet:
        image_prompt.sheet(case, ways).save(args.sheet, quality=80)


if __name__ == "__main__":
    main()
