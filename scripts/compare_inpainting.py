"""Does a model trained on masks fill them better than one that they are only put back for?

`python scripts/compare_inpainting.py --trained runs/inpainting/export` (made by `ldm finetune --config
finetune_inpainting` on pictures of scripts/render_postcards.py).
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
    parser.add_argument("--trained", required=True, help="an inpainting model: a folder, as for txt2img")
    parser.add_argument("--model", help="the text-to-image model (default: the embedded one)")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--n", type=int, default=300, help="pictures of each kind of mask")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sampler", default="dpmpp_2m_sde")
    parser.add_argument("--scale", type=float, default=2.5, help="guidance scale")
    parser.add_argument("--controls", action="store_true", help="with other masks and pictures, too")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--sheet", type=Path, help="write pictures here: source, mask, put back, trained")
    with reported():
        _compare(parser.parse_args())


def _compare(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.postcards.comparisons import inpainting
    from ldm.postcards.scoring.scorer import Scorer
    from ldm.postcards.scoring.sources import Settings, picture_size

    pipes = {"put back": load(args.model), "trained on masks": load(args.trained)}
    scorer, settings = Scorer.load(args.scorer), Settings(args.steps, args.sampler, args.scale)
    size, cases, figures = picture_size(pipes["put back"]), {}, {}
    for kind in inpainting.KINDS:
        case = inpainting.make_case(kind, args.n, size)
        ways = inpainting.fill(pipes, case, settings, args.controls)
        found = inpainting.measure_filling(scorer, case, ways)
        print(f"{kind}, {len(case.prompts)} pictures", inpainting.HEADER, sep="\n\n")
        print(*(f"| {name} {row}" for name, row in found.items()), "", sep="\n")
        cases[kind], figures[kind] = (case, ways), {name: asdict(row) for name, row in found.items()}
    if args.out:
        figures = {**vars(args), "found": figures}
        args.out.write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    if args.sheet:
        inpainting.sheet(cases).save(args.sheet, quality=85)


if __name__ == "__main__":
    main()
