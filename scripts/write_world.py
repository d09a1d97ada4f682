"""Write a model's table of what it can draw: `python scripts/write_world.py weights/postcard`.

With `--sprites` that of the sprites' world, with `--count 200` of its 200 most usual things.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--sprites", action="store_true", help="of the sprites beside the postcards")
    parser.add_argument("--count", type=int, help="of the sprites' things (default: all)")
    parser.add_argument(
        "--styles", nargs="+", default=["flat", "3d"], help="of the sprites (default: flat 3d)"
    )
    args = parser.parse_args()
    with reported():
        from ldm.postcards.sprites.table import postcard_world, sprite_world
        from ldm.prompts.world import TABLE

        world = sprite_world(args.count, args.styles) if args.sprites else postcard_world()
        world.write(args.model / TABLE)


if __name__ == "__main__":
    main()
