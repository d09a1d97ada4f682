"""Draw docs/gallery.md: every prompt of docs/gallery.txt with the same four seeds, whatever comes.

`python scripts/draw_gallery.py`, or with a model's folder and an --out of its own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported

DOCS = Path(__file__).resolve().parents[1] / "docs"
SEEDS = (0, 1, 2, 3)
PAGE = """# Gallery

{count} prompts written by hand, each drawn with the seeds {seeds}. None was picked, none left out:
`python scripts/draw_gallery.py` draws them again.

| Prompt | |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder (default: the embedded model)")
    parser.add_argument("--prompts", type=Path, default=DOCS / "gallery.txt", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of gallery.md (default: %(default)s)")
    with reported():
        _draw(parser.parse_args())


def _draw(args: argparse.Namespace) -> None:
    import ldm
    from ldm.images.pixels import contact_sheet

    prompts = args.prompts.read_text(encoding="utf-8-sig").splitlines()
    pipe = ldm.load(args.model) if args.model else ldm.load()
    folder = args.out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(prompts):
        name = f"{number:02}.webp"
        images = pipe([prompt] * len(SEEDS), seed=list(SEEDS)).images
        contact_sheet(images, columns=len(SEEDS)).save(folder / name, quality=92)
        rows.append(f"| {prompt} | ![{prompt}](gallery/{name}) |")
    page = PAGE.format(count=len(prompts), seeds=", ".join(map(str, SEEDS)), rows="\n".join(rows))
    (args.out / "gallery.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
