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
from ldm.postcards.scoring import editing
from ldm.postcards.scoring.scorer import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=48, help="edits, the four kinds in turn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[0.3, 0.4, 0.6, 0.9], help="image to image"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 5, 9, 14, 3, 6], help="cases on the sheet")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--out", type=Path, help="the sheet, WebP or PNG")
    args = parser.parse_args()
    pipe, scorer = ldm.load(device="cpu", dtype="fp32"), Scorer.load(args.scorer)
    cases, steps = editing.sample_cases(args.n), {"num_inference_steps": args.steps}
    ways = {
        f"img2img {s:g}": editing.image_to_image(pipe, cases, strength=s, **steps) for s in args.strengths
    }
    ways["edit"] = editing.edited(pipe, cases, **steps)
    print("| | " + " | ".join(editing.WHAT) + " |\n|---|" + "---|" * len(editing.WHAT))
    for name, drawn in ways.items():
        figures = editing.measured(scorer, cases, drawn).values()
        print(f"| {name} | " + " | ".join(f"{r.right} of {r.n}, {db:.1f} dB" for r, db in figures) + " |")
    for n in (10, 50):
        errors = np.array([editing.reconstructed(pipe, case, n)[1] for case in cases[:4]])
        print(f"round trip, {n} steps: DDIM {errors[:, 0].max():.1e}, exact {errors[:, 1].max():.1e}")
    if args.out:
        some, shown = [cases[i] for i in args.rows], (ways["edit"], next(iter(ways.values())))
        editing.sheet(pipe, some, [each[args.rows] for each in shown], args.steps).save(args.out, quality=85)


if __name__ == "__main__":
    with reported():
        main()
