"""Which things has a model of the sprite world learnt? Each is asked for on a plain background.

python scripts/score_sprites.py --model runs/sprites/unet/export [--limit 100] [--out figures.json]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ldm.postcards.sprites.retrieval import Verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--things", type=int, default=400, help="the most usual ones; default: %(default)s")
    parser.add_argument("--styles", nargs="+", default=["flat", "3d"], help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="so many pairs of thing and style, at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write figures and what was wrong as JSON")
    args = parser.parse_args()
    with reported():
        from ldm.postcards.sprites.retrieval import by_thing, summary

        verdicts = _verdicts(args)
        figures = summary(verdicts)
        for name, value in figures.items():
            print(f"{name:16} {value:.3f}")
        if args.out:
            text = json.dumps(figures | {"shares": by_thing(verdicts)}, indent=1) + "\n"
            args.out.write_text(text, encoding="utf-8")


def _verdicts(args: argparse.Namespace) -> "list[Verdict]":
    import numpy as np

    import ldm
    from ldm.postcards.sprites.retrieval import retrieve
    from ldm.postcards.sprites.scene import make_world

    pipe = ldm.load(args.model)

    def draw(prompts: Sequence[str]) -> "list[NDArray[np.uint8]]":
        return [np.asarray(image) for image in pipe(list(prompts), seed=args.seed).images]

    return retrieve(make_world(args.things, args.styles), draw, args.limit, args.seed)


if __name__ == "__main__":
    main()
