"""What each way of drawing faster costs: prompt following, the distance to the exact pictures, seconds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import reported
from ldm.evaluate.distances import psnr
from ldm.evaluate.features import EVALUATION
from ldm.evaluate.reconstruction import Images, to_uint8
from ldm.files import weights_folder, whole_file
from ldm.images.sheet import captioned, table
from ldm.pipeline import Pipeline, load
from ldm.postcards.scoring.following import judge
from ldm.postcards.scoring.prompts import Prompt, evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer

Fields = Mapping[str, Any]  # of a Request
Figures = dict[str, dict[str, float]]  # of each setting, by its name

CACHES = [{"cache_interval": n, "cache_branch_id": b} for n, b in ((2, 0), (2, 1), (3, 0), (3, 1))]
INTERVALS = [{"guidance_interval": (0, 0.75)}, {"guidance_interval": (0, 0.5)}]
STEPS = [{"num_inference_steps": n} for n in (6, 5, 4)]
SETTINGS: Sequence[Fields] = ({}, {"fast": True}, *INTERVALS, *CACHES, {"token_merging_ratio": 0.5}, *STEPS)
EXACT = "exact"
HEAD = ("", "s a picture", "of exact", "following, %", "difference in points, 95 %", "PSNR, dB")
SHOWN = 8  # pictures of each setting


def name_of(fields: Fields) -> str:
    """As the flags of `txt2img` have it."""
    flags = {"num_inference_steps": "steps"}
    parts = [f"--{flags.get(name, name).replace('_', '-')} {_told(value)}" for name, value in fields.items()]
    return " ".join(parts).strip() or EXACT


def _told(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is True else " ".join(f"{number:g}" for number in np.atleast_1d(value))


def measure_prices(
    pipe: Pipeline, scorer: Scorer, prompts: Sequence[Prompt], settings: Sequence[Fields]
) -> Iterator[tuple[str, dict[str, float], Images]]:
    """The name of each setting, its figures and its pictures; the first is the exact one.

    Prompt k is drawn with seed k.
    """
    first: tuple[list[list[bool]], Images] | None = None
    for fields in settings:
        images = pipe([prompt.text for prompt in prompts], seed=0, output_type="pt", **fields).images
        drawn = to_uint8(images)
        read = scorer.read(drawn)
        right = [[ok for _, ok in judge(p, read, k, scorer.config)] for k, p in enumerate(prompts)]
        found = price(right if first is None else first[0], right)
        if first is not None:
            found["psnr"] = float(psnr(first[1], drawn).mean())
        first = first or (right, drawn)
        yield name_of(fields), found, drawn


def price(exact: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Of all that prompts state, the share in percent that is in their pictures; the difference to `exact`.

    By pictures, drawn from the same prompts and seeds; with the 95 % interval of a bootstrap over pictures.
    """
    asked = np.array([len(each) for each in other])
    right, before = (np.array([sum(each) for each in group]) for group in (other, exact))
    some = np.random.default_rng(0).integers(0, len(asked), (2000, len(asked)))
    spread = 100 * (right - before)[some].sum(axis=1) / asked[some].sum(axis=1)
    low, high = np.quantile(spread, (0.025, 0.975))
    share, difference = 100 * right.sum() / asked.sum(), 100 * (right - before).sum() / asked.sum()
    found = {"following": share, "difference": difference, "low": low, "high": high, "n": len(asked)}
    return {name: float(value) for name, value in found.items()}


def measure_seconds(pipe: Pipeline, settings: Sequence[Fields], rounds: int) -> Figures:
    """Medians over rounds, in each of which every setting draws one picture alone, in turn."""
    seconds: dict[str, list[float]] = {name_of(fields): [] for fields in settings}
    for k in range(rounds + 1):  # the first warms up
        for fields in settings:
            began = time.perf_counter()
            pipe("a red sailboat on a calm sea at sunset", seed=k, **fields)
            seconds[name_of(fields)].append(time.perf_counter() - began)
    return {name: {"seconds": float(np.median(each[1:])), "rounds": rounds} for name, each in seconds.items()}


def markdown(figures: Figures) -> str:
    """A row for each setting, the first of which is the exact one; what was not measured is left blank."""
    exact, lines = next(iter(figures.values())), [HEAD, ("---",) * len(HEAD)]
    for name, found in figures.items():
        known = "seconds" in found and "seconds" in exact
        differs = "difference" in found and found is not exact
        lines.append(
            (
                name if name == EXACT else f"`{name}`",
                f"{found['seconds']:.3f}" if known else "",
                f"{found['seconds'] / exact['seconds']:.2f}" if known else "",
                f"{found['following']:.1f}" if "following" in found else "",
                "{difference:+.1f} ({low:+.1f} to {high:+.1f})".format(**found) if differs else "",
                f"{found['psnr']:.1f}" if "psnr" in found else "",
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(figures: Figures, path: Path) -> None:
    """As JSON."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def sheet(drawn: Mapping[str, Images]) -> Image.Image:
    """The first pictures of each setting, a row each."""
    rows = [[Image.fromarray(image) for image in images] for images in drawn.values()]
    return table([[captioned(row[0], name), *row[1:]] for name, row in zip(drawn, rows, strict=True)])


def main() -> None:
    """Parse the command line, measure, tell; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-n", type=int, default=250, help="prompts (default: %(default)s)")
    add("--rounds", type=int, default=9, help="of timings (default: %(default)s)")
    add("--timings-only", action="store_true", help="as on a quiet machine; the rest is kept from --out")
    add("--settings", type=json.loads, default=SETTINGS, metavar="JSON", help="[{}, ...], exact first")
    add("--out", type=Path, default=Path("runs/fast.json"), help="figures, added (default: %(default)s)")
    add("--grid", type=Path, metavar="PNG", help="the first pictures of each setting")
    args = parser.parse_args()
    with reported():
        pipe = load(device="cpu", dtype="fp32")
        figures: Figures = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        if not args.timings_only and args.n:
            scorer, drawn = Scorer.load(weights_folder(EVALUATION)), dict[str, Images]()
            for name, own, images in measure_prices(pipe, scorer, evaluation_prompts(args.n), args.settings):
                figures[name], drawn[name] = figures.get(name, {}) | own, images[:SHOWN]
                write(figures, args.out)
                if args.grid is not None:
                    sheet(drawn).save(args.grid)
        if args.rounds:
            found = measure_seconds(pipe, args.settings, args.rounds)
            figures |= {name: figures.get(name, {}) | each for name, each in found.items()}
        write(figures, args.out)
        print(markdown(figures))
