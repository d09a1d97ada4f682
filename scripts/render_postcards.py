"""Postcards with captions, a folder to fine-tune on: `python scripts/render_postcards.py runs/postcards`."""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--count", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="other pictures; default: %(default)s")
    with reported():
        _render(parser.parse_args())


def _render(args: argparse.Namespace) -> None:
    from ldm import postcards
    from ldm.postcards.folder import write_folder

    def make(k: int) -> tuple[Any, str]:
        rng = random.Random(f"postcard {args.seed} {k}")
        scene = postcards.sample_scene(rng)
        return postcards.render(scene), postcards.caption(scene, rng)

    write_folder(args.folder, args.count, make)


if __name__ == "__main__":
    main()
