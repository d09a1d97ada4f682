"""Draw docs/gallery.md: every prompt of docs/gallery.txt with the same four seeds, whatever comes.

`python scripts/draw_gallery.py`, or with a model's folder and an --out of its own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder (default: the embedded model)")
    parser.add_argument("--prompts", type=Path, default=DOCS / "gallery.txt", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of gallery.md (default: %(default)s)")
    args = parser.parse_args()
    with reported():
        import ldm
        from ldm.postcards.gallery import draw_gallery

        prompts = args.prompts.read_text(encoding="utf-8-sig").splitlines()
        draw_gallery(ldm.load(args.model) if args.model else ldm.load(), prompts, args.out)


if __name__ == "__main__":
    main()
