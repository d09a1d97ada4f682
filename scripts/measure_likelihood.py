"""What likelihoods say of a postcard model: captions, the bound, zero-shot classification, outliers.

python scripts/measure_likelihood.py [captions ode bound kinds outliers] [--out FILE.json] [--chart FILE.webp]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported

# question -> (how many renders, dtype): the ODE and small differences want fp32
QUESTIONS = {
    "outliers": (60, "fp32"),
    "captions": (60, "fp32"),
    "ode": (24, "fp32"),
    "bound": (16, "bf16"),
    "kinds": (500, "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="default: all")
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--n", type=int, help="renders; default: as many as each question needs")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    parser.add_argument("--chart", type=Path, help="write the bound's curve here, as WebP")
    args = parser.parse_args()
    with reported():
        figures = {}
        for question in args.questions or QUESTIONS:
            figures[question] = answer(question, args)
            print(question, json.dumps(figures[question], indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def answer(question: str, args: argparse.Namespace) -> dict[str, Any]:
    import ldm
    from ldm.postcards.scoring import likelihood as asked
    from ldm.postcards.scoring.scorer import Scorer

    n, dtype = QUESTIONS[question]
    n, pipe = args.n or n, ldm.load(args.model, dtype=dtype)
    match question:
        case "outliers":
            return asked.outliers(pipe, n)
        case "captions":
            return asked.captions(pipe, asked.by_error, n)
        case "ode":
            return asked.captions(pipe, asked.by_ode, n)
        case "bound":
            return asked.bounds(pipe, n, steps=500, chart=args.chart)
        case _:
            return asked.kinds(pipe, Scorer.load(args.scorer), n)


if __name__ == "__main__":
    main()
