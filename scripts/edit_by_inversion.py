"""Edits by inversion beside image to image, in figures and as a sheet.

`python scripts/edit_by_inversion.py --out docs/theory/inversion.webp` edits renders whose scene is known with
the embedded model. It prints, for each kind of edit, how many pictures show all that was asked, and how well
that is kept which the edit has no business with; and how far both inversions' round trips are off.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import ldm
from ldm.errors import reported
from ldm.postcards.comparisons import editing
from ldm.postcards.scoring.scorer import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--n", type=int, default=48, help="pictures, the four kinds of edit in turn")
    add("--steps", type=int, default=20)
    add("--edits", type=float, nargs="+", default=[0.8, 0.9], help="strengths of edits")
    add("--img2img", type=float, nargs="+", default=[0.4, 0.6, 0.9], help="strengths of image to image")
    add("--rows", type=int, nargs="+", default=[4, 8, 1, 9, 2, 7], help="pictures on the sheet")
    add("--scorer", type=Path, default=Path("weights/postcard-eval"))
    add("--out", type=Path, help="the sheet, WebP or PNG")
    args = parser.parse_args()
    pipe, scorer = ldm.load(device="cpu", dtype="fp32"), Scorer.load(args.scorer)
    cases, ways = editing.sample_cases(args.n), dict[str, editing.Images]()
    for way, strengths in ((editing.edited, args.edits), (editing.image_to_image, args.img2img)):
        for strength in strengths:
            drawn = way(pipe, cases, num_inference_steps=args.steps, strength=strength)
            ways[f"{way.__name__} {strength:g}"] = drawn
    print("| | " + " | ".join(editing.WHAT) + " |\n|---|" + "---|" * len(editing.WHAT))
    for name, drawn in ways.items():
        figures = editing.measured(scorer, cases, drawn).values()
        print(f"| {name} | " + " | ".join(f"{r.right} of {r.n}, {db:.1f} dB" for r, db in figures) + " |")
    if args.out:
        shown = [drawn[args.rows] for drawn in ways.values()]
        sheet = editing.sheet(pipe, [cases[i] for i in args.rows], shown, 10)
        sheet.save(args.out, quality=85)
    for n in (10, 50):
        errors = np.array([editing.reconstructed(pipe, case, n)[1] for case in cases[:4]])
        print(f"round trip, {n} steps: DDIM {errors[:, 0].max():.1e}, exact {errors[:, 1].max():.1e}")


if __name__ == "__main__":
    with reported():
        main()
