"""Does a ControlNet keep to its edges, and does the picture still follow its prompt?

Given are the edges of renders that no model was trained on, and their captions. Without the network the same
prompts and seeds are drawn, so what is gained and lost is of pairs; the renders through the autoencoder alone
are what no drawing can beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from scipy.ndimage import distance_transform_edt

from ldm.errors import UserError
from ldm.evaluate.distances import frechet_distance
from ldm.evaluate.reconstruction import Images, reconstructed
from ldm.evaluate.report import Rate, rate
from ldm.images.pixels import contact_sheet
from ldm.pipeline import Pipeline
from ldm.postcards.comparisons.inpainting import Mean, advance, right
from ldm.postcards.scoring.prompts import Prompt, evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import Settings, controlled, drawn, rendered
from ldm.preprocess import preprocess

TOLERANCE = 2.0  # pixels that an edge may be off; of 128, a little more than BSDS allows
WITHOUT, AUTOENCODER = "without control", "its autoencoder alone"
HEADER = "| | F of edges | gain | all that is said | lost, points | Frechet |\n|---|---|---|---|---|---|"


@dataclass(frozen=True, eq=False)
class Case:
    """Prompts, their renders, and what a preprocessor makes of those."""

    prompts: Sequence[Prompt]
    sources: Images
    edges: Images


@dataclass(frozen=True)
class Keeping:
    """What is measured of pictures that were drawn in one way.

    edges: F-score of their edges against the given ones. gain: by how much more than of the first way.
    following: pictures that have all that their captions say. lost: by how many points less than of the first
    way. frechet: squared distance of the scorer's features to those of the renders themselves.
    """

    edges: Mean
    gain: Mean
    following: Rate
    lost: Mean
    frechet: float

    def __str__(self) -> str:
        return f"| {self.edges} | {self.gain} | {self.following} | {self.lost} | {self.frechet:.2f} |"


def make_case(count: int, size: int = 128, name: str = "canny") -> Case:
    """`count` of the evaluation's own scenes, with the edges of their renders.

    Raises UserError for another number than there can be, or too few for an interval.
    """
    prompts = evaluation_prompts()
    if not 2 <= count <= len(prompts):
        raise UserError(f"--n must be from 2 to {len(prompts)} (got {count})")
    sources = rendered(prompts[:count], size)
    return Case(prompts[:count], sources, np.stack([preprocess(each, name) for each in sources]))


def edge_scores(given: Images, found: Images, tolerance: float = TOLERANCE) -> NDArray[np.float64]:
    """F-score of each picture's edges [N, H, W, 3], white on black, against the given ones': [N].

    2 P R / (P + R): P is the share of found edge pixels that lie within `tolerance` pixels of a given one, R
    the share of given ones that lie so near to a found one (Martin et al. 2004, "Learning to Detect Natural
    Image Boundaries", section 3, without its one-to-one matching). Where both have none, 1.
    """
    return np.array(
        [_edge_score(a[..., 0] > 0, b[..., 0] > 0, tolerance) for a, b in zip(given, found, strict=True)]
    )


def _edge_score(given: NDArray[np.bool_], found: NDArray[np.bool_], tolerance: float) -> float:
    if not given.any() or not found.any():
        return float(given.any() == found.any())
    precision = (distance_transform_edt(~given)[found] <= tolerance).mean()
    recall = (distance_transform_edt(~found)[given] <= tolerance).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def draw_ways(
    pipe: Pipeline, control: str, case: Case, settings: Settings, scales: Sequence[float] = (1.0,)
) -> dict[str, Images]:
    """The case drawn without a control and with one of each strength, of the same seeds."""
    with Progress(console=Console(stderr=True)) as progress:

        def bar(name: str) -> partial[None]:
            return partial(advance, progress, progress.add_task(name, total=len(case.prompts)))

        ways = {WITHOUT: drawn(pipe, case.prompts, settings, bar(WITHOUT))}
        for scale in scales:
            name = f"with control, scale {scale:g}"
            use = {"model": control, "scale": scale}
            ways[name] = controlled(pipe, case.prompts, case.edges, use, settings, bar(name))
    return ways | {AUTOENCODER: reconstructed(pipe, case.sources)}


def measure_keeping(
    scorer: Scorer, case: Case, ways: Mapping[str, Images], name: str = "canny"
) -> dict[str, Keeping]:
    """Each way's figures; those of gain and loss against the first way's."""
    _, renders = right(scorer, case.prompts, case.sources)
    found: dict[str, Keeping] = {}
    first: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    for way, images in ways.items():
        edges = edge_scores(case.edges, np.stack([preprocess(each, name) for each in images]))
        outcomes, features = right(scorer, case.prompts, images)
        points = 100.0 * np.array(outcomes)
        first = first or (edges, points)
        found[way] = Keeping(
            Mean.of(edges),
            Mean.of(edges - first[0]),
            rate(outcomes),
            Mean.of(first[1] - points),
            frechet_distance(features, renders),
        )
    return found


def sheet(case: Case, ways: Mapping[str, Images], each: int = 8) -> Image.Image:
    """Edges and the pictures of each way, a row for each of the first `each` prompts."""
    stacks = [case.edges, *ways.values()]
    shown = [Image.fromarray(stack[i]) for i in range(min(each, len(case.prompts))) for stack in stacks]
    return contact_sheet(shown, columns=len(stacks))
