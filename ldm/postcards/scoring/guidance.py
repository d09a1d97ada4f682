"""Three ways to a condition, side by side: what its scale does to fidelity and to diversity.

The condition as input is a prompt at scale 1; classifier-free guidance the same prompt at larger scales
(Ho and Salimans 2022, figure 4); classifier guidance no prompt, and the gradient of a classifier (Dhariwal
and Nichol 2021, figure 4). The scorer that judges has seen renders only, never latents.
"""

from __future__ import annotations

import argparse
import json
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
from ldm.errors import reported
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


def edits(pipe: Pipeline, before: Image.Image, kinds: Sequence[str], strength: float) -> list[Image.Image]:
    """What a picture becomes, noised to a strength and denoised without a prompt towards each kind."""
    common: dict[str, Any] = {"image": before, "strength": strength, "seed": 0, "num_inference_steps": 20}
    return [pipe(**arguments(CLASSIFIER, kind, 8.0), **common).images[0] for kind in kinds]


SIZE, BIG = (620, 470), 3  # of a plot, and how much larger it is drawn, for smooth lines
LEFT, TOP, RIGHT, BOTTOM = 62, 14, 604, 424


def plot(curves: Curves, value: Callable[[Point], float], label: str, highest: float) -> Image.Image:
    """`value` from 0 to `highest` over diversity from 0 to 1.2: a line for each way, a dot for each scale."""
    canvas = Image.new("RGB", (SIZE[0] * BIG, SIZE[1] * BIG), "white")
    pen = ImageDraw.Draw(canvas)

    def at(x: float, y: float) -> tuple[float, float]:
        return BIG * (LEFT + (RIGHT - LEFT) * x / 1.2), BIG * (BOTTOM - (BOTTOM - TOP) * y / highest)

    def write(place: tuple[float, float], text: str, anchor: str, colour: str = "#333") -> None:
        pen.text(place, text, colour, anchor=anchor, font_size=13 * BIG)

    for i in range(7):
        x, y = i * 0.2, i * highest / 6
        pen.line([at(0, y), at(1.2, y)], "#ddd", BIG)
        pen.line([at(x, 0), at(x, highest)], "#eee", BIG)
        write((at(0, y)[0] - 6 * BIG, at(0, y)[1]), f"{y:.3g}", "rm")
        write((at(x, 0)[0], at(x, 0)[1] + 6 * BIG), f"{x:.1f}", "mt")
    write((BIG * (LEFT + RIGHT) / 2, BIG * (SIZE[1] - 6)), "diversity (1: that of renders)", "ms")
    write((BIG * (LEFT + 8), BIG * (TOP + 4)), label, "lt")
    for n, (way, points) in enumerate(curves.items()):
        spots = [at(point.diversity, value(point)) for point in points]
        pen.line(spots, COLOURS[way], 2 * BIG)
        for point, (x, y) in zip(points, spots, strict=True):
            pen.circle((x, y), 4 * BIG, COLOURS[way])
            write((x + 7 * BIG, y - 3 * BIG), f"{point.scale:g}", "ls", COLOURS[way])
        write((BIG * (LEFT + 8), BIG * (TOP + 24 + 18 * n)), way, "lt", COLOURS[way])
    return canvas.resize(SIZE, Image.Resampling.LANCZOS)


# --- the command -----------------------------------------------------------------------------------------


def main() -> None:
    """Parse the command line, measure, draw; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Fidelity against diversity over guidance scales.")
    parser.add_argument("--classifier", required=True, help="a folder that train_classifier.py exported")
    parser.add_argument("--model", help="as for txt2img (default: the embedded model)")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--each", type=int, default=8, help="pictures of each kind at each scale")
    parser.add_argument("--out", type=Path, required=True, help="figures and pictures go into this folder")
    with reported():
        _measure(parser.parse_args())


def _measure(args: argparse.Namespace) -> None:
    from ldm import load

    args.out.mkdir(parents=True, exist_ok=True)
    pipe, scorer = load(args.model).with_classifier(args.classifier), Scorer.load(args.scorer)
    curves = measure_guidance(pipe, scorer, args.each, lambda *found: print(*found, flush=True))
    figures = {
        way: [asdict(point) | {"share": point.share.share} for point in points]
        for way, points in curves.items()
    }
    (args.out / "guidance.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    farthest = max(point.frechet for points in curves.values() for point in points)
    plots = (
        plot(curves, lambda point: point.share.share, "share of pictures that show the class", 1.2),
        plot(curves, lambda point: point.frechet, "Frechet distance to renders of the class", 1.1 * farthest),
    )
    contact_sheet(plots, 2).save(args.out / "guidance.webp", quality=85)
    grid(pipe, ("castle", "duck", "tree", "rocket"), SCALES[CLASSIFIER], seed=5).save(
        args.out / "guidance_grid.webp", quality=85
    )
    before = pipe("a white cat in a meadow", seed=1).images[0]
    made = edits(pipe, before, ("snowman", "flower", "mushroom"), strength=0.7)
    contact_sheet([before, *made], 4).save(args.out / "guidance_edit.webp", quality=85)
