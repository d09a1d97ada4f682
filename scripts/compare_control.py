"""Does a ControlNet of edges keep to them, and the picture still to its prompt?

`python scripts/compare_control.py --control runs/control/export` (made by `ldm train-control --config
finetune_postcard_control` on pictures of scripts/render_postcards.py).
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--control", required=True, help="the ControlNet: a folder, as for txt2img")
    parser.add_argument("--model", help="the text-to-image model (default: the embedded one)")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--preprocess", default="canny", help="what it was trained with")
    parser.add_argument("--n", type=int, default=300, help="pictures of each way")
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0], help="of the control")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sampler", default="dpmpp_2m_sde")
    parser.add_argument("--scale", type=float, default=2.5, help="guidance scale")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--sheet", type=Path, help="write pictures here: edges, without, with, autoencoder")
    with reported():
        _compare(parser.parse_args())


def _compare(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.postcards.comparisons import control
    from ldm.postcards.scoring.scorer import Scorer
    from ldm.postcards.scoring.sources import Settings, picture_size

    pipe = load(args.model).with_controlnet(args.control)
    scorer, settings = Scorer.load(args.scorer), Settings(args.steps, args.sampler, args.scale)
    case = control.make_case(args.n, picture_size(pipe), args.preprocess)
    ways = control.draw_ways(pipe, args.control, case, settings, args.strength)
    found = control.measure_keeping(scorer, case, ways, args.preprocess)
    print(control.HEADER, *(f"| {name} {row}" for name, row in found.items()), sep="\n")
    if args.out:
        figures = {**vars(args), "found": {name: asdict(row) for name, row in found.items()}}
        args.out.write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    if args.sheet:
        control.sheet(case, ways).save(args.sheet, quality=85)


if __name__ == "__main__":
    main()
