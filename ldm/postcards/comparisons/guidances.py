"""Every guidance by name, at its best scale of three: prompt following, Frechet distance, time a picture.

The scale is chosen with other prompts than those that the table is of, so that no row is a lucky one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.diffusion.guidances.catalogue import GUIDANCES
from ldm.errors import UserError, reported
from ldm.evaluate.distances import frechet_distance
from ldm.evaluate.features import EVALUATION
from ldm.evaluate.reconstruction import Images, to_uint8
from ldm.files import weights_folder
from ldm.pipeline import Pipeline, load
from ldm.postcards.comparisons.fast import SHOWN, Figures, measure_seconds, name_of, price, sheet, write
from ldm.postcards.scoring.following import judge
from ldm.postcards.scoring.prompts import Prompt, evaluation_prompts, reference_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import rendered

SCALES = (1.5, 2.5, 4.0)  # the embedded model draws with 2.5
# Names whose defaults say nothing: the interval that --fast has, and a mimic scale of the model.
OPTIONS = {"interval": "interval:0,0.75", "dynamic_thresholding": "dynamic_thresholding:mimic=2.5"}
NAMES = tuple(OPTIONS.get(name, name) for name in GUIDANCES)
HEAD = (
    "",
    "scale",
    "following, %",
    "difference in points, 95 %",
    "Frechet distance",
    "s a picture",
    "of CFG",
)

Right = list[list[bool]]  # for each picture, what its prompt states: whether it is there
Drawn = tuple[Right, float, Images]  # with the Frechet distance to renders of the prompts' scenes


def drawn(pipe: Pipeline, scorer: Scorer, prompts: Sequence[Prompt], **fields: Any) -> Drawn:
    """Prompt k with seed k."""
    images = to_uint8(pipe([each.text for each in prompts], seed=0, output_type="pt", **fields).images)
    read, truth = scorer.read(images), scorer.read(rendered(prompts, images.shape[1]))
    right = [[ok for _, ok in judge(p, read, k, scorer.config)] for k, p in enumerate(prompts)]
    return right, frechet_distance(truth.features, read.features), images


def following(right: Right) -> float:
    """In percent of all that prompts state."""
    return 100 * sum(map(sum, right)) / sum(map(len, right))


def compare(
    pipe: Pipeline,
    scorer: Scorer,
    count: int,
    names: Sequence[str],
    known: Mapping[str, Mapping[str, float]],
    on_row: Callable[[str, dict[str, float], Images], object],
) -> None:
    """A row for each name that is not known yet: its best scale by `count` / 2 prompts, figures by `count`.

    The first, "cfg", is drawn in any case: differences are to it.
    """
    choosing, asked = reference_prompts(count // 2), evaluation_prompts(count)
    plain: Right | None = None
    for name in names:
        if name in known and plain is not None:
            continue
        tried = {
            scale: drawn(pipe, scorer, choosing, guidance=name, guidance_scale=scale)
            for scale in (SCALES if name not in known else (known[name]["scale"],))
        }
        # Of scales that follow the prompts as well, the one whose pictures lie nearest to renders.
        best = max(tried, key=lambda scale: (following(tried[scale][0]), -tried[scale][1]))
        right, distance, images = drawn(pipe, scorer, asked, guidance=name, guidance_scale=best)
        plain = right if plain is None else plain
        row = {**price(plain, right), "frechet": float(distance), "scale": best}
        row |= {f"following at {scale:g}": following(found[0]) for scale, found in tried.items()}
        on_row(name, row, images[:SHOWN])


def seconds_of(pipe: Pipeline, figures: Figures, rounds: int) -> Figures:
    """Of a picture alone at the scale of each row, in turn, so that all see the machine's moods."""
    settings = {name: {"guidance": name, "guidance_scale": row["scale"]} for name, row in figures.items()}
    found = measure_seconds(pipe, list(settings.values()), rounds)
    return {name: row | found[name_of(settings[name])] for name, row in figures.items()}


def markdown(figures: Figures) -> str:
    """A row for each guidance, the first of which is CFG; what was not measured is left blank."""
    plain, lines = next(iter(figures.values())), [HEAD, ("---",) * len(HEAD)]
    for name, row in figures.items():
        timed = "seconds" in row and "seconds" in plain
        lines.append(
            (
                f"`{name}`",
                f"{row['scale']:g}",
                f"{row['following']:.1f}",
                "" if row is plain else "{difference:+.1f} ({low:+.1f} to {high:+.1f})".format(**row),
                f"{row['frechet']:.2f}",
                f"{row['seconds']:.3f}" if timed else "",
                f"{row['seconds'] / plain['seconds']:.2f}" if timed else "",
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Parse the command line, measure, tell; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-n", type=int, default=250, help="prompts of the table (default: %(default)s)")
    add("--rounds", type=int, default=9, help="of timings; 0 for none (default: %(default)s)")
    add("--names", nargs="+", default=NAMES, metavar="GUIDANCE", help="with options (default: all there are)")
    add("--out", type=Path, default=Path("runs/guidances.json"), help="rows, added (default: %(default)s)")
    add("--grid", type=Path, metavar="PNG", help="the first pictures of each new row")
    with reported():
        _compare(parser.parse_args())


def _compare(args: argparse.Namespace) -> None:
    if args.n < 4:
        raise UserError(f"-n must be at least 4 (got {args.n}): a distance is of several pictures")
    pipe, scorer = load(device="cpu", dtype="fp32"), Scorer.load(weights_folder(EVALUATION))
    figures: Figures = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    shown = dict[str, Images]()

    def keep(name: str, row: dict[str, float], images: Images) -> None:
        figures[name] = figures.get(name, {}) | row
        shown[name] = images
        print(f"{name} {row['scale']:g}: {row['following']:.1f} %, {row['frechet']:.2f}", flush=True)
        write(figures, args.out)
        if args.grid is not None:
            sheet(shown).save(args.grid)

    names = ("cfg", *(name for name in args.names if name != "cfg"))
    compare(pipe, scorer, args.n, names, dict(figures), keep)
    if args.rounds:
        figures = seconds_of(pipe, figures, args.rounds)
        write(figures, args.out)
    print(markdown(figures))
