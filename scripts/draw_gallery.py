"""Draw docs/gallery.md: every prompt of docs/gallery.txt with the same seeds, whatever comes.

python scripts/draw_gallery.py [MODEL] [--steps N]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEEDS = (0, 1, 2, 3)
PAGE = """# Gallery

{count} prompts written by hand ([gallery.txt](gallery.txt)),
each drawn with seeds 0, 1, 2 and 3. None was picked, none left out:
`python scripts/draw_gallery.py` draws it again.

| Prompt | Seeds 0 to 3 |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the embedded model")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()

    import ldm
    from ldm.images import grid

    prompts = (ROOT / "docs/gallery.txt").read_text().splitlines()
    pipe = ldm.load(args.model) if args.model else ldm.load()
    folder = args.out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(prompts):
        images = pipe([prompt] * len(SEEDS), seed=list(SEEDS), num_inference_steps=args.steps).images
        name = f"{number:02}.webp"
        grid(images, columns=len(SEEDS)).save(folder / name, quality=92)
        rows.append(f"| {prompt} | ![{prompt}](gallery/{name}) |")
    (args.out / "gallery.md").write_text(PAGE.format(count=len(prompts), rows="\n".join(rows)))


if __name__ == "__main__":
    main()
