"""Does a model draw windmills when asked, only then, and all else as before?"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.errors import reported


def main() -> None:
    """Parse the command line, draw, score; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]")
    parser.add_argument("--embedding", action="append", default=[], metavar="[NAME=]FILE")
    parser.add_argument("--noun", default="windmill", help='what prompts call it, such as "sks windmill"')
    parser.add_argument("--particular", action="store_true", help="ask for the one with blue sails too")
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="instead of its own; each 8 times")
    parser.add_argument("--stamp", action="store_true", help="tell of stamps, as render_windmills.py makes")
    parser.add_argument("--n", type=int, default=32, help="own prompts; default: %(default)s")
    parser.add_argument("--ordinary", type=int, default=100, help="old prompts; default: %(default)s")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="prompt i is drawn with seed + i")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--pictures", type=Path, help="write grids of what was drawn into this folder")
    with reported():
        _score(parser.parse_args())


def _score(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from ldm import load
    from ldm.evaluate.report import markdown, write_json, write_pictures
    from ldm.postcards.newcomer.learnt import (
        SHOWS_ONE,
        SHOWS_PARTICULAR,
        SHOWS_STAMP,
        free_prompt,
        newcomer_prompts,
        score,
        windmill_probe,
    )
    from ldm.postcards.scoring.following import ATTRIBUTES
    from ldm.postcards.scoring.prompts import evaluation_prompts
    from ldm.postcards.scoring.scorer import Scorer
    from ldm.postcards.scoring.sources import Settings
    from ldm.prompts.tags import parse_embedding, parse_lora

    pipe = load(args.model, device=args.device, dtype=args.dtype)
    for file, weight, text_weight in map(parse_lora, args.lora):
        pipe = pipe.with_lora(file, weight, text_weight)
    for name, file in map(parse_embedding, args.embedding):
        pipe = pipe.with_embedding(file, name)
    own = newcomer_prompts(args.n, args.noun, particular=args.particular)
    if args.prompts:
        own = [free_prompt(text) for text in args.prompts for _ in range(8)]
    groups = {"asked for": own, "ordinary prompts": evaluation_prompts(args.ordinary)}
    scorer = Scorer.load(args.scorer)
    probes = {SHOWS_ONE: windmill_probe(scorer)}
    if args.particular:
        probes[SHOWS_PARTICULAR] = windmill_probe(scorer, particular=True)
    groups = {name: prompts for name, prompts in groups.items() if prompts}
    settings = Settings(steps=args.steps, seed=args.seed)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("drawing", total=sum(map(len, groups.values())))
        table, pictures = score(
            pipe, probes, groups, settings, lambda done: progress.update(task, completed=done)
        )
    print(markdown(table, (*probes, *([SHOWS_STAMP] if args.stamp else []), *ATTRIBUTES)))
    if args.out:
        write_json(args.out, table, {"model": pipe.name, "lora": args.lora, "embedding": args.embedding})
    if args.pictures:
        write_pictures(args.pictures, pictures)
