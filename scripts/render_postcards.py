"""Pictures with captions of the embedded model's own world, to fine-tune on.

`python scripts/render_postcards.py runs/postcards --count 4000`
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import UserError, reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--count", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="other pictures; default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="pixels; default: %(default)s")
    with reported():
        _render(parser.parse_args())


def _render(args: argparse.Namespace) -> None:
    from PIL import Image

    from ldm import postcards

    if args.folder.is_dir() and any(args.folder.iterdir()):
        raise UserError(f"{args.folder} is not empty: give a new folder, or empty it")
    args.folder.mkdir(parents=True, exist_ok=True)
    for k in range(args.count):
        rng = random.Random(f"postcard {args.seed} {k}")
        scene = postcards.sample_scene(rng)
        Image.fromarray(postcards.render(scene, args.size)).save(args.folder / f"{k:05d}.png")
        (args.folder / f"{k:05d}.txt").write_text(postcards.caption(scene, rng) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
