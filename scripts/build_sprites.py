"""Build the sprite atlas from npm packages: `python scripts/build_sprites.py`; needs npm and resvg-py."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/sprites"), help="default: %(default)s")
    parser.add_argument("--things", type=Path, help="the table of things (default: <out>/things.tsv)")
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path("runs/npm"),
        help="npm's files are kept here; default: %(default)s",
    )
    args = parser.parse_args()
    with reported():
        from ldm.postcards.sprites import words
        from ldm.postcards.sprites.build import build

        build(args.things or args.out / "things.tsv", args.out, args.packages)
        words.build(args.out, args.packages)


if __name__ == "__main__":
    main()
