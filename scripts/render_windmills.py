"""Pictures with captions of what the embedded model has never seen, to fine-tune on.

`python scripts/render_windmills.py runs/windmills --count 30`; `--particular --count 10`: always the same.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--count", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="other pictures; default: %(default)s")
    parser.add_argument(
        "--particular", action="store_true", help="always the one with red bands and blue sails"
    )
    parser.add_argument("--noun", default="windmill", help='what captions call it, such as "sks windmill"')
    parser.add_argument("--stamped", action="store_true", help="a stamp in a corner, and masks of the rest")
    parser.add_argument("--size", type=int, default=128, help="pixels; default: %(default)s")
    with reported():
        _render(parser.parse_args())


def _render(args: argparse.Namespace) -> None:
    from ldm.postcards.folder import write_folder
    from ldm.postcards.newcomer.windmill import PARTICULAR, sample_postcard, stamped

    def make(k: int) -> Any:
        rng = random.Random(f"windmill {args.seed} {k}")
        postcard = sample_postcard(rng, PARTICULAR if args.particular else None)
        picture = postcard.render(args.size)
        caption = postcard.caption(rng, args.noun)
        if args.stamped:
            picture, rest = stamped(picture)
            return picture, caption, rest
        return picture, caption

    write_folder(args.folder, args.count, make)


if __name__ == "__main__":
    main()
