"""Two ways to fill a mask, held against the picture that it hides: does training on masks beat putting back?

Filled are renders that no model was trained on, by their own captions. What the mask hides is one of many
true pictures, but at its border the rest of the picture says much: there a filling can be right or wrong.
Beneath the mask the models are shown another render, as one does who wants something else there. Their own
would be a hint: the latents that are kept beside a mask are made of pixels beneath it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID
from scipy.ndimage import distance_transform_edt, maximum_filter

from ldm.dataset.masks import random_masks
from ldm.errors import UserError
from ldm.evaluate.distances import frechet_distance
from ldm.evaluate.reconstruction import Images, reconstructed
from ldm.evaluate.report import NORMAL_95, Rate, rate
from ldm.images.pixels import contact_sheet
from ldm.pipeline import Pipeline
from ldm.postcards.scoring.following import judge
from ldm.postcards.scoring.prompts import Prompt, evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import Settings, filled, rendered
from ldm.train.loss_recipe import MaskSection

Masks = NDArray[np.bool_]  # [N, H, W], true where it is drawn anew
KINDS = ("box", "strokes", "half")
BAND, MARGIN = 6, 0.05  # pixels inside a mask's edge; around the things in a box, of the picture's side
RESAMPLES = 100  # of the bootstrap


@dataclass(frozen=True)
class Mean:
    """A mean with the half width of its 95 % interval, 1.96 standard errors."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Mean:
        """Of at least two values."""
        return cls(float(values.mean()), float(NORMAL_95 * values.std(ddof=1) / len(values) ** 0.5))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}"


@dataclass(frozen=True)
class Filling:
    """What is measured of pictures that were filled in one way.

    border: PSNR in dB within `BAND` pixels of the mask's edge, inside it. seam: how much more two neighbours
    differ across that edge than in the picture itself, of 255. following: pictures that have all that their
    captions say. frechet: squared distance of the scorer's features to those of the renders themselves.
    gain, closer: by how much border and frechet are better than of the first way, with intervals: of pairs,
    and by a bootstrap over pictures.
    """

    border: Mean
    seam: Mean
    following: Rate
    frechet: float
    gain: Mean
    closer: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.closer
        return (
            f"| {self.border} | {self.gain} | {self.seam} | {self.following} | "
            f"{self.frechet:.2f} | {low:.2f} to {high:.2f} |"
        )


HEADER = (
    "| | border PSNR, dB | gain, dB | seam | all that is said | Frechet | lower by, 95 % |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, eq=False)
class Case:
    """Pictures with masks of one kind."""

    prompts: Sequence[Prompt]
    sources: Images
    masks: Masks

    @property
    def shown(self) -> Images:
        """What is given to be filled: the sources, and beneath the masks the one before."""
        return np.where(self.masks[..., None], np.roll(self.sources, 1, axis=0), self.sources)

    def compose(self, images: Images) -> Images:
        """`images` within the masks, else the sources."""
        return np.where(self.masks[..., None], images, self.sources)


def make_case(kind: str, count: int, size: int = 128) -> Case:
    """`count` renders that hold some thing, of the evaluation's own scenes, each with a mask of one of KINDS.

    Raises UserError for another number than there can be, or too few for an interval.
    """
    prompts = [each for each in evaluation_prompts() if each.scene.groups]
    if not 2 <= count <= len(prompts):
        raise UserError(f"--n must be from 2 to {len(prompts)} (got {count})")
    prompts = prompts[:count]
    maker = {"box": _boxes, "strokes": _strokes, "half": _halves}[kind]
    return Case(prompts, rendered(prompts, size), maker(prompts, size))


def _boxes(prompts: Sequence[Prompt], size: int) -> Masks:
    """The room of the first things that are named, and a margin, up to whole cells of the latents."""
    masks = np.zeros((len(prompts), size, size), bool)
    for mask, prompt in zip(masks, prompts, strict=True):
        room = prompt.scene.groups[0].boxes
        top, left = (min(getattr(box, name) for box in room) - MARGIN for name in ("top", "left"))
        bottom, right = (max(getattr(box, name) for box in room) + MARGIN for name in ("bottom", "right"))
        mask[_cells(top, bottom, size), _cells(left, right, size)] = True
    return masks


def _cells(start: float, stop: float, size: int) -> slice:
    """Pixels from share `start` to `stop` of a side, up to sixteenths of it: of 128 pixels, to eights."""
    cell = size // 16
    return slice(max(0, math.floor(16 * start) * cell), math.ceil(16 * stop) * cell)


def _strokes(prompts: Sequence[Prompt], size: int) -> Masks:
    """As the trainer draws them, from a seed of their own."""
    only = MaskSection(rectangles=0, strokes=1, whole=0, none=0)
    masks = random_masks(len(prompts), (size, size), torch.Generator().manual_seed(2**31), only)
    return masks[:, 0].numpy() > 0


def _halves(prompts: Sequence[Prompt], size: int) -> Masks:
    """Left, right, upper and lower in turn."""
    first = np.arange(size) < size // 2
    sides = [np.broadcast_to(side, (size, size)) for side in (first, ~first)]
    turns = [*sides, *(side.T for side in sides)]
    return np.stack([turns[i % 4] for i in range(len(prompts))])


# --- measures ----------------------------------------------------------------------------------------------


def border_psnr(case: Case, images: Images, band: int = BAND) -> NDArray[np.float64]:
    """PSNR in dB of each picture within `band` pixels of its mask's edge, inside it, at most 60: [N]."""
    found = []
    for mask, source, image in zip(case.masks, case.sources, images, strict=True):
        near = mask & (distance_transform_edt(mask) <= band)
        error = (image[near].astype(np.float64) - source[near]) ** 2
        found.append(10 * np.log10(255.0**2 / max(error.mean(), 255.0**2 * 1e-6)))
    return np.array(found)


def seam(case: Case, images: Images) -> NDArray[np.float64]:
    """Mean difference of neighbours on both sides of the mask's edge beyond the source's own, of 255: [N]."""
    return np.array(
        [
            _across(mask, image) - _across(mask, source)
            for mask, image, source in zip(case.masks, images, case.sources, strict=True)
        ]
    )


def _across(mask: NDArray[np.bool_], image: NDArray[np.uint8]) -> float:
    x, differences = image.astype(np.float64), []
    for axis in (0, 1):
        edge = np.diff(mask, axis=axis)
        differences.append(np.abs(np.diff(x, axis=axis))[edge])
    return float(np.concatenate(differences).mean())


def right(
    scorer: Scorer, prompts: Sequence[Prompt], images: Images
) -> tuple[list[bool], NDArray[np.float32]]:
    """Whether each picture has all that its prompt states, and the scorer's features of all."""
    read = scorer.read(images)
    found = [all(ok for _, ok in judge(prompt, read, i, scorer.config)) for i, prompt in enumerate(prompts)]
    return found, read.features


def follow(scorer: Scorer, prompts: Sequence[Prompt], images: Images) -> tuple[Rate, NDArray[np.float32]]:
    """The share of pictures that have all that their prompts state, and the scorer's features of all."""
    found, features = right(scorer, prompts, images)
    return rate(found), features


def lower_by(
    renders: NDArray[np.float32], first: NDArray[np.float32], other: NDArray[np.float32]
) -> tuple[float, float]:
    """95 % bootstrap interval, over pictures, of how much nearer `other` is to `renders` than `first`."""
    rng, gaps = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        own = rng.integers(0, len(renders), len(renders))
        near, far = (frechet_distance(each[own], renders[own]) for each in (other, first))
        gaps.append(far - near)
    low, high = np.quantile(gaps, (0.025, 0.975))
    return float(low), float(high)


def measure_filling(scorer: Scorer, case: Case, ways: Mapping[str, Images]) -> dict[str, Filling]:
    """Each way's figures, those of gain and closer against the first way's; `ways` are composed pictures."""
    _, renders = follow(scorer, case.prompts, case.sources)
    found: dict[str, Filling] = {}
    first: tuple[NDArray[np.float64], NDArray[np.float32]] | None = None
    for name, images in ways.items():
        border = border_psnr(case, images)
        following, features = follow(scorer, case.prompts, images)
        first = first or (border, features)
        found[name] = Filling(
            Mean.of(border),
            Mean.of(seam(case, images)),
            following,
            frechet_distance(features, renders),
            Mean.of(border - first[0]),
            (0.0, 0.0) if features is first[1] else lower_by(renders, first[1], features),
        )
    return found


def fill(
    pipes: Mapping[str, Pipeline], case: Case, settings: Settings, controls: bool = False
) -> dict[str, Images]:
    """The case filled by each model, and by the first one's autoencoder alone: none can fill better.

    Picture i has one seed in all. `controls`: by the first also with masks a cell of its latents larger, so
    that what it keeps is not made of what is beneath; and with the picture itself beneath, to see what that
    gives away.
    """
    first, *others = pipes
    larger = maximum_filter(case.masks, (1, *(2 * pipes[first].vae.downscale + 1,) * 2))
    given = {name: (pipes[name], case.shown, case.masks) for name in (first, *others)}
    if controls:
        given |= {
            f"{first}, the mask a cell larger": (pipes[first], case.shown, larger),
            f"{first}, the picture itself beneath": (pipes[first], case.sources, case.masks),
        }
    ways = {}
    with Progress(console=Console(stderr=True)) as progress:
        for name, (pipe, images, masks) in given.items():
            bar = partial(advance, progress, progress.add_task(name, total=len(case.prompts)))
            ways[name] = case.compose(filled(pipe, case.prompts, images, masks, settings, bar))
    ways["its autoencoder alone"] = case.compose(reconstructed(pipes[first], case.sources))
    return ways


def advance(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def sheet(cases: Mapping[str, tuple[Case, Mapping[str, Images]]], each: int = 4) -> Image.Image:
    """Source, mask and the first two ways' pictures side by side, `each` of a kind, two groups in a row."""
    shown = []
    for case, ways in cases.values():
        hidden = np.where(case.masks[..., None], np.uint8(128), case.sources)
        stacks = [case.sources, hidden, *list(ways.values())[:2]]
        shown += [stack[i] for i in range(min(each, len(case.sources))) for stack in stacks]
    return contact_sheet([Image.fromarray(image) for image in shown], columns=8)
