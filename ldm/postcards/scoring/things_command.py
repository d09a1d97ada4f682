"""The command line that scores a model of the sprites' world."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import reported
from ldm.postcards.scoring.command import add_drawing, report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHUFFLED = "renders of other prompts"


def main() -> None:
    """Parse the command line, measure, report; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Prompt following of a model of the sprites' world.")
    parser.add_argument("--model", required=True, help="as for txt2img")
    parser.add_argument(
        "--scorer", type=Path, default=Path("weights/sprites-eval"), help="default: %(default)s"
    )
    parser.add_argument("--things", type=int, default=400, help="the most usual ones; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="draw each prompt so often, by other seeds")
    parser.add_argument(
        "--thumbnails", action="store_true", help="only ask for each thing on a plain background, no scorer"
    )
    add_drawing(parser)
    args = parser.parse_args()
    with reported():
        if args.thumbnails:
            _look(args)
        else:
            _score(args)


def _score(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.evaluate.features import ImageTower
    from ldm.postcards.scoring.detector import Detector
    from ldm.postcards.scoring.following import following
    from ldm.postcards.scoring.frozen import read_prompts
    from ldm.postcards.scoring.measure import Instruments, measure, renders_of
    from ldm.postcards.scoring.sources import Settings
    from ldm.postcards.scoring.things import apart, by_thing, joined, told

    pipe = load(args.model, device=args.device, dtype=args.dtype)
    tools = Instruments(Detector.load(args.scorer), ImageTower.embedded())
    names = tools.scorer.config
    frozen = read_prompts(args.things)
    seen = [each for each in frozen if each.unseen is None][: args.limit] * args.repeats
    unseen = [each for each in frozen if each.unseen is not None][: args.limit] * args.repeats
    groups = {"seen": [each.prompt for each in seen], "held-out": [each.prompt for each in unseen]}
    settings = Settings(args.steps, args.sampler, args.scale, args.batch, args.seed)
    results = measure(pipe, tools, groups, settings)
    results.table |= dict(apart(unseen, results.readings["held-out"], names))
    others = [*groups["seen"][1:], *groups["seen"][:1]]
    results.table[SHUFFLED] = following(others, results.readings[renders_of("seen")], names)
    things = by_thing(
        [*groups["seen"], *groups["held-out"]],
        joined(results.readings["seen"], results.readings["held-out"]),
        names,
    )
    results.facts["things that hold"] = sum(each.holds for each in things.values())
    report(args, results, {"things": {noun: each.row() for noun, each in sorted(things.items())}})
    print(told(things))


def _look(args: argparse.Namespace) -> None:
    """Without a scorer, at any time of a training."""
    import numpy as np

    import ldm
    from ldm.postcards.sprites.retrieval import by_thing, retrieve, summary
    from ldm.postcards.sprites.scene import make_world

    pipe = ldm.load(args.model, device=args.device, dtype=args.dtype)
    how = {"num_inference_steps": args.steps, "sampler": args.sampler, "guidance_scale": args.scale}

    def draw(prompts: Sequence[str]) -> list[NDArray[np.uint8]]:
        return [np.asarray(image) for image in pipe(list(prompts), seed=args.seed, **how).images]

    verdicts = retrieve(make_world(args.things), draw, args.limit, args.seed, args.batch)
    figures = summary(verdicts)
    for name, value in figures.items():
        print(f"{name:16} {value:.3f}")
    if args.out:
        text = json.dumps(figures | {"shares": by_thing(verdicts)}, indent=1) + "\n"
        args.out.write_text(text, encoding="utf-8")
