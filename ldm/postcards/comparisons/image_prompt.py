"""Does a picture as prompt say what it shows, and does the text still count beside it?

References are renders that no model was trained on. What their full captions state is asked of the pictures
that are drawn with them: with no text, with a text that names their things alone, and with the text of
another scene, which contradicts. Without the image prompt the same texts and seeds are drawn, so what is
lost is of pairs, and what a picture has by chance is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from ldm.errors import UserError
from ldm.evaluate.reconstruction import Images
from ldm.evaluate.report import Rate, rate
from ldm.images.pixels import contact_sheet
from ldm.pipeline import Pipeline
from ldm.postcards import phrases
from ldm.postcards.comparisons.inpainting import Mean, advance, right
from ldm.postcards.scoring.following import (
    BOTH,
    BOTH_COLOURS,
    COLOUR,
    COUNTS,
    KIND,
    PLACE,
    TIME,
    WEATHER,
    judge,
)
from ldm.postcards.scoring.prompts import Named, Prompt, evaluation_prompts, full_caption, state
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import Settings, drawn, prompted, rendered

NOTHING, THINGS, ANOTHER = "no text", "its things named", "another scene's text"
# What is asked of a picture, and which of `judge`'s answers say it.
ASKED = {
    "place": (PLACE,),
    "hour": (TIME,),
    "weather": (WEATHER,),
    "things": (KIND, BOTH, *COUNTS.values()),
    "things in their colours": (COLOUR, BOTH_COLOURS),
}
HEADER = f"| | {' | '.join(ASKED)} | all that is said | lost, points |\n|---|{'---|' * len(ASKED)}---|---|"


@dataclass(frozen=True, eq=False)
class Case:
    """What full captions of scenes state, their renders, and the texts of each way."""

    references: Sequence[Prompt]
    pictures: Images
    texts: Mapping[str, Sequence[Prompt]]


@dataclass(frozen=True)
class Taken:
    """What is measured of pictures that were drawn in one way.

    of_reference: by ASKED, how many of what the reference shows. said: pictures that have all that their own
    text says. lost: by how many points less than without the reference.
    """

    of_reference: Mapping[str, Rate]
    said: Rate
    lost: Mean

    def __str__(self) -> str:
        cells = [*self.of_reference.values(), self.said, self.lost]
        return f"| {' | '.join(map(str, cells))} |"


def make_case(count: int, size: int = 128) -> Case:
    """`count` of the evaluation's own scenes. Raises UserError for another number than there can be."""
    prompts = evaluation_prompts()
    if not 2 <= count <= len(prompts):
        raise UserError(f"--n must be from 2 to {len(prompts)} (got {count})")
    references = [state(full_caption(each.scene), each.scene) for each in prompts[:count]]
    texts = {
        NOTHING: [state("", each.scene) for each in references],
        THINGS: [state(things_named(each.objects), each.scene) for each in references],
        ANOTHER: [*references[1:], references[0]],
    }
    return Case(references, rendered(references, size), texts)


def things_named(objects: Sequence[Named]) -> str:
    """A text of things: "a house and a tree", "two cats"; empty where there are none."""
    counted = {1: "a", 2: "two", 3: "three"}
    return " and ".join(
        f"{counted[named.count]} {phrases.NOUNS[named.kind][0][named.count > 1]}" for named in objects
    )


def draw_ways(
    pipe: Pipeline, case: Case, adapter: Mapping[str, Any], settings: Settings, scales: Sequence[float]
) -> dict[str, dict[str, Images]]:
    """By text the case drawn without its pictures, and with them at each scale, of the same seeds.

    `adapter` are arguments of `with_ip_adapter`.
    """
    prompting = {f"with it, scale {s:g}": pipe.with_ip_adapter(**adapter, scale=s) for s in scales}
    ways: dict[str, dict[str, Images]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for text, prompts in case.texts.items():

            def bar(name: str, text: str = text) -> partial[None]:
                task = progress.add_task(f"{text}, {name}", total=len(case.references))
                return partial(advance, progress, task)

            ways[text] = {"without": drawn(pipe, prompts, settings, bar("without"))}
            for name, reading in prompting.items():
                ways[text][name] = prompted(reading, prompts, case.pictures, settings, bar(name))
    return ways


def measure(
    scorer: Scorer, case: Case, ways: Mapping[str, Mapping[str, Images]]
) -> dict[str, dict[str, Taken]]:
    """Figures of each text and way; what is lost is against the text's first way."""
    found: dict[str, dict[str, Taken]] = {}
    for text, drawings in ways.items():
        first: NDArray[np.float64] | None = None
        found[text] = {}
        for name, images in drawings.items():
            outcomes, _ = right(scorer, case.texts[text], images)
            points = 100.0 * np.array(outcomes)
            first = points if first is None else first
            taken = taken_from(scorer, case.references, images)
            found[text][name] = Taken(taken, rate(outcomes), Mean.of(first - points))
    return found


def taken_from(scorer: Scorer, references: Sequence[Prompt], images: Images) -> dict[str, Rate]:
    """By ASKED, how many of what references state pictures have."""
    read = scorer.read(images)
    judged = [each for i, prompt in enumerate(references) for each in judge(prompt, read, i, scorer.config)]
    return {asked: rate(ok for attribute, ok in judged if attribute in own) for asked, own in ASKED.items()}


def sheet(case: Case, ways: Mapping[str, Mapping[str, Images]], each: int = 6) -> Image.Image:
    """A row for each of the first references: itself, and by text the pictures without it and with it."""
    stacks = [case.pictures]
    for drawings in ways.values():
        _, *with_it = drawings.values()
        stacks += [drawings["without"], with_it[-1]]
    count = min(each, len(case.references))
    shown = [Image.fromarray(stack[i]) for i in range(count) for stack in stacks]
    return contact_sheet(shown, columns=len(stacks))
