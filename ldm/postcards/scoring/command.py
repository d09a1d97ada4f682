"""The evaluation's command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import reported

if TYPE_CHECKING:
    from ldm.postcards.scoring.measure import Results


def main() -> None:
    """Parse the command line, measure, report; a user's mistake is one line and exit code 2."""
    with reported():
        _evaluate(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prompt following, reconstruction and distances of a postcard model."
    )
    parser.add_argument("--model", help="as for txt2img (default: the embedded model)")
    parser.add_argument(
        "--scorer", type=Path, default=Path("weights/postcard-eval"), help="default: %(default)s"
    )
    parser.add_argument("--n", type=int, default=1000, help="prompts of seen combinations, at most 1000")
    parser.add_argument(
        "--held-out", type=int, default=500, help="prompts of held-out combinations, at most 500"
    )
    add_drawing(parser)
    parser.add_argument(
        "--fault-find", type=int, nargs="*", metavar="T", help="denoise renders from T (700 500)"
    )
    return parser.parse_args()


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """How pictures are drawn, and where what was found is written."""
    parser.add_argument("--limit", type=int, help="no more than this many of either: a quick look")
    parser.add_argument("--steps", type=int, help="default: the model's own, as for sampler and scale")
    parser.add_argument("--sampler")
    parser.add_argument("--scale", type=float, help="guidance scale")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="prompt i is drawn with seed + i")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, help="write figures here as JSON, and the table beside it as .md")
    parser.add_argument("--pictures", type=Path, help="write grids of what was drawn into this folder")


def report(args: argparse.Namespace, results: Results, more: Mapping[str, object] | None = None) -> None:
    """Print the table and the facts, and write what the command line asks for; `more` into the JSON alone."""
    from ldm.evaluate.report import markdown, write_json, write_pictures
    from ldm.postcards.scoring.following import ATTRIBUTES

    table = markdown(results.table, ATTRIBUTES)
    print(table, json.dumps(results.facts, indent=2), sep="\n\n")
    if args.out:
        write_json(args.out, results.table, results.facts | dict(more or {}))
        args.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    if args.pictures:
        write_pictures(args.pictures, results.pictures)


def _evaluate(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.evaluate.features import ImageTower
    from ldm.postcards.scoring.measure import Instruments, measure
    from ldm.postcards.scoring.prompts import evaluation_prompts
    from ldm.postcards.scoring.scorer import Scorer
    from ldm.postcards.scoring.sources import Settings

    pipe = load(args.model, device=args.device, dtype=args.dtype)
    tools = Instruments(Scorer.load(args.scorer), ImageTower.find(args.scorer))
    limit = args.limit if args.limit is not None else max(args.n, args.held_out)
    groups = {
        "seen": evaluation_prompts(min(args.n, limit)),
        "held-out": evaluation_prompts(min(args.held_out, limit), held_out=True),
    }
    settings = Settings(args.steps, args.sampler, args.scale, args.batch, args.seed)
    start_from = () if args.fault_find is None else args.fault_find or (700, 500)
    report(args, measure(pipe, tools, groups, settings, start_from))
