"""Three ways to a condition, side by side: what its scale does to fidelity and to diversity.

The condition as input is a prompt at scale 1; classifier-free guidance the same prompt at larger scales
(Ho and Salimans 2022, figure 4); classifier guidance no prompt, and the gradient of a classifier (Dhariwal
and Nichol 2021, figure 4). The scorer that judges has seen renders only, never latents.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.spatial.distance import pdist

from ldm import postcards as world
from ldm.checkpoint.beside.classifier import EMBEDDED_CLASSIFIER
from ldm.errors import UserError, reported
from ldm.evaluate.distances import frechet_distance
from ldm.evaluate.reconstruction import Images
from ldm.evaluate.report import Rate, rate
from ldm.images.pixels import contact_sheet
from ldm.pipeline import Pipeline
from ldm.postcards.scoring.scorer import Scorer

CLASSIFIER, FREE = "classifier guidance, no prompt", "classifier-free guidance, a prompt"
SCALES: Mapping[str, tuple[float, ...]] = {
    CLASSIFIER: (0, 1, 2, 4, 8, 16),
    FREE: (1, 1.5, 2.5, 4, 8),
}
COLOURS = {CLASSIFIER: "#d9480f", FREE: "#1c7ed6"}


def arguments(way: str, kind: str, scale: float) -> dict[str, Any]:
    """Of the pipeline's call, for a picture of that kind."""
    if way == FREE:
        return {"prompt": f"a {kind}", "guidance_scale": scale}
    return {"prompt": "", "guidance_scale": 1.0, "classifier_class": kind, "classifier_scale": scale}


@dataclass(frozen=True)
class Point:
    """What one scale of one way gives.

    share: of the pictures, those in which the scorer sees the class. frechet: distance of the scorer's
    features, all classes together, from those of renders of the classes. diversity: mean distance of two
    pictures of one class, as a share of that of two renders; the mean over classes.
    """

    scale: float
    share: Rate
    frechet: float
    diversity: float


Curves = Mapping[str, Sequence[Point]]


def spread(features: Sequence[NDArray[np.floating[Any]]]) -> float:
    """The mean over groups [N, D] of the mean distance of two of its members."""
    return float(np.mean([pdist(each).mean() for each in features]))


def measure_guidance(
    pipe: Pipeline, scorer: Scorer, each: int, on_point: Callable[[str, Point], object]
) -> dict[str, list[Point]]:
    """`each` pictures of every kind, for every scale of every way; the same seeds everywhere.

    `pipe` has a classifier of KINDS.
    """
    kinds = scorer.config.kinds
    reference = [scorer.read(renders(kind, each)).features for kind in kinds]
    curves: dict[str, list[Point]] = {}
    for way, scales in SCALES.items():
        for scale in scales:
            read = [
                scorer.read(draw(pipe, [1000 * k + i for i in range(each)], **arguments(way, kind, scale)))
                for k, kind in enumerate(kinds)
            ]
            seen = [bool(there) for k, one in enumerate(read) for there in one.count[:, k] > 0]
            features = [one.features for one in read]
            distance = frechet_distance(np.concatenate(features), np.concatenate(reference))
            point = Point(scale, rate(seen), distance, spread(features) / spread(reference))
            curves.setdefault(way, []).append(point)
            on_point(way, point)
    return curves


def draw(pipe: Pipeline, seeds: Sequence[int], batch: int = 8, **call: Any) -> Images:
    """One picture for each seed."""
    prompt, pictures = call.pop("prompt"), list[Image.Image]()
    for i in range(0, len(seeds), batch):
        some = list(seeds[i : i + batch])
        pictures += pipe([prompt] * len(some), seed=some, **call).images
    return np.stack([np.asarray(each) for each in pictures])


def renders(kind: str, count: int) -> Images:
    """Renders of scenes with one thing of that kind, for everything else as the world has it."""
    return np.stack([world.render(scene, 128) for scene in _scenes(kind, count)])


def _scenes(kind: str, count: int) -> Iterator[world.Scene]:
    rng, found = random.Random(f"guidance {kind}"), 0
    while found < count:
        scene = world.sample_scene(rng, compositions={"one": 1})
        if scene.groups[0].kind == kind:
            found += 1
            yield scene


# --- pictures --------------------------------------------------------------------------------------------


def grid(pipe: Pipeline, kinds: Sequence[str], scales: Sequence[float], seed: int) -> Image.Image:
    """A row for each kind: one seed, no prompt, and the classifier's gradient at rising scales."""
    pictures = [
        draw(pipe, [seed], **arguments(CLASSIFIER, kind, scale))[0] for kind in kinds for scale in scales
    ]
    return contact_sheet([Image.fromarray(each) for each in pictures], len(scales))


def edits(pipe: Pipeline, prompts: Sequence[str], kinds: Sequence[str], strength: float) -> Image.Image:
    """A row for each prompt: its picture, and that noised to a strength and led to kinds without a prompt."""
    shown = list[Image.Image]()
    for seed, prompt in enumerate(prompts, 1):
        before = pipe(prompt, seed=seed).images[0]
        common: dict[str, Any] = {"image": before, "strength": strength, "seed": 0, "num_inference_steps": 20}
        shown += [before, *(pipe(**arguments(CLASSIFIER, kind, 8.0), **common).images[0] for kind in kinds)]
    return contact_sheet(shown, 1 + len(kinds))


SIZE, BIG = (620, 470), 3  # of a plot, and how much larger it is drawn, for smooth lines
LEFT, TOP, RIGHT, BOTTOM = 62, 14, 604, 424


def plot(curves: Curves, value: Callable[[Point], float], label: str, apart: float) -> Image.Image:
    """`value` over diversity: a line for each way, a dot for each scale; lines of the grid `apart`."""
    canvas = Image.new("RGB", (SIZE[0] * BIG, SIZE[1] * BIG), "white")
    pen = ImageDraw.Draw(canvas)
    points = [point for each in curves.values() for point in each]
    across, up = _ticks([each.diversity for each in points], 0.05), _ticks(list(map(value, points)), apart)

    def at(x: float, y: float) -> tuple[float, float]:
        right, top = ((v - low) / (high - low) for v, (low, *_, high) in ((x, across), (y, up)))
        return BIG * (LEFT + (RIGHT - LEFT) * right), BIG * (BOTTOM - (BOTTOM - TOP) * top)

    def write(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> None:
        size, rim = 13 * BIG, 2 * BIG  # the rim is for what is written on a line
        pen.text((x, y), text, colour, None, anchor, font_size=size, stroke_width=rim, stroke_fill="white")

    for x in across:
        pen.line([at(x, up[0]), at(x, up[-1])], "#eee", BIG)
        write(at(x, 0)[0], BIG * (BOTTOM + 6), f"{x:.2f}", "mt")
    for y in up:
        pen.line([at(across[0], y), at(across[-1], y)], "#ddd", BIG)
        write(BIG * (LEFT - 6), at(0, y)[1], f"{y:.3g}", "rm")
    write(BIG * (LEFT + RIGHT) / 2, BIG * (SIZE[1] - 6), "diversity (1: that of renders)", "ms")
    write(BIG * (LEFT + 8), BIG * (BOTTOM - 48), label, "lb")
    for n, (way, own) in enumerate(curves.items()):
        write(BIG * (LEFT + 8), BIG * (BOTTOM - 30 + 18 * n), way, "lb", COLOURS[way])
        spots = [at(point.diversity, value(point)) for point in own]
        pen.line(spots, COLOURS[way], 2 * BIG)
        for i, (x, y) in enumerate(spots):
            pen.circle((x, y), 4 * BIG, COLOURS[way])
            side, anchor = (-8, "rm") if i % 2 else (8, "lm")  # neighbours may lie near each other
            write(x + side * BIG, y, f"{own[i].scale:g}", anchor, COLOURS[way])
    return canvas.resize(SIZE, Image.Resampling.LANCZOS)


def _ticks(values: Sequence[float], apart: float) -> list[float]:
    """Multiples of `apart`, at least two, around the values."""
    low, high = math.floor(min(values) / apart), math.ceil(max(values) / apart)
    return [k * apart for k in range(low, max(high, low + 1) + 1)]


# --- the command -----------------------------------------------------------------------------------------


def main() -> None:
    """Parse the command line, measure, draw; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Fidelity against diversity over guidance scales.")
    parser.add_argument("--classifier", default=EMBEDDED_CLASSIFIER, help="default: %(default)s")
    parser.add_argument("--model", help="as for txt2img (default: the embedded model)")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--each", type=int, default=8, help="pictures of each kind at each scale")
    parser.add_argument("--out", type=Path, required=True, help="figures and pictures go into this folder")
    with reported():
        _measure(parser.parse_args())


def _measure(args: argparse.Namespace) -> None:
    from ldm import load

    if args.each < 2:
        raise UserError(f"--each must be at least 2 (got {args.each}): diversity is of pairs")
    args.out.mkdir(parents=True, exist_ok=True)
    pipe, scorer = load(args.model).with_classifier(args.classifier), Scorer.load(args.scorer)
    curves = measure_guidance(pipe, scorer, args.each, lambda *found: print(*found, flush=True))
    figures = {
        way: [asdict(point) | {"share": point.share.share} for point in points]
        for way, points in curves.items()
    }
    (args.out / "guidance.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plots = (
        plot(curves, lambda point: point.share.share, "share of pictures that show the class", 0.2),
        plot(curves, lambda point: point.frechet, "Frechet distance to renders of the class", 5),
    )
    contact_sheet(plots, 2).save(args.out / "guidance.webp", quality=85)
    grid(pipe, ("castle", "duck", "tree", "rocket"), SCALES[CLASSIFIER], seed=5).save(
        args.out / "guidance_grid.webp", quality=85
    )
    before = ("an orange cat in a meadow", "a red car in the city", "a blue house in the forest")
    edits(pipe, before, ("snowman", "mushroom", "castle"), strength=0.7).save(
        args.out / "guidance_edit.webp", quality=85
    )
