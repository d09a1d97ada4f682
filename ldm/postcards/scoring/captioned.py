"""Prompt following of pictures whose captions are the world's own evaluation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.evaluate.bias import Judge
from ldm.evaluate.features import EVALUATION
from ldm.evaluate.figures import Found, rate_figure
from ldm.evaluate.pictures import Pictures
from ldm.files import sha256, weights_folder, whole_folder
from ldm.images.png import save_png
from ldm.postcards.scoring.following import following
from ldm.postcards.scoring.prompts import Prompt, evaluation_prompts, reference_prompts
from ldm.postcards.scoring.scorer import CONFIG, SIZE, WEIGHTS, Scorer
from ldm.postcards.sprites.mixture import render

NAMES = {"postcard": False, "postcard-held-out": True}  # of the two sets of prompts -> held out
FOLLOWING = "prompt following"
BATCH = 64
NOTHING = "nothing"  # for a picture in which the scorer is sure of no thing


def world_prompts(name: str) -> list[Prompt]:
    """The evaluation prompts of one of NAMES."""
    return evaluation_prompts(held_out=NAMES[name])


def prompts_of(captions: Sequence[str]) -> list[Prompt]:
    """The evaluation prompts with these texts; those that are none are left out."""
    known = _known()
    return [known[caption] for caption in captions if caption in known]


@cache
def _known() -> dict[str, Prompt]:
    return {prompt.text: prompt for name in NAMES for prompt in world_prompts(name)}


def caption_following(pictures: Pictures) -> Found:
    """What the scorer reads in those pictures whose captions it knows to state something."""
    if not any(pictures.captions):
        return Found(left_out={FOLLOWING: f"no picture of {pictures.folder} has a caption"})
    told = [k for k, caption in enumerate(pictures.captions) if caption in _known()]
    if not told:
        why = "no caption is one of the embedded world's evaluation prompts (--prompts postcard draws them)"
        return Found(left_out={FOLLOWING: why})
    folder = weights_folder(EVALUATION)
    if not (folder / CONFIG).exists():
        return Found(left_out={FOLLOWING: f"this installation has no scorer ({folder})"})
    scorer = Scorer.load(folder)
    small = [
        np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for batch in pictures.batches(BATCH)
        for image in batch
    ]
    stated = prompts_of([str(pictures.captions[k]) for k in told])
    rates = following(stated, scorer.read(np.stack(small)[told]), scorer.config)
    figures = [rate_figure(name, rate, {"that say it": rate.n}) for name, rate in rates.items()]
    protocol = {"scorer": str(folder / WEIGHTS), "sha256": sha256(folder / WEIGHTS), "pictures": len(told)}
    return Found(tuple(figures), protocol={"prompt_following": protocol})


def world_judge() -> Judge:
    """What the scorer sees most surely in each picture, its colour, and the scenery. Raises UserError."""
    folder = weights_folder(EVALUATION)
    if not (folder / CONFIG).exists():
        raise UserError(f"this installation has no scorer ({folder}): give --bias-classifier or --bias-texts")
    scorer = Scorer.load(folder)
    names = scorer.config

    def read(images: Sequence[Image.Image]) -> dict[str, list[str]]:
        small = [image.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
        found = scorer.read(np.stack([np.asarray(image) for image in small]))
        kinds = found.presence.argmax(1)
        surely = [bool(found.presence[i, k] >= 0.5) for i, k in enumerate(kinds)]
        colours = [names.colours[found.colour[i, k]] for i, k in enumerate(kinds)]
        return {
            "kind": [names.kinds[k] if there else NOTHING for k, there in zip(kinds, surely, strict=True)],
            "colour": [each if there else NOTHING for each, there in zip(colours, surely, strict=True)],
            "place": [names.places[k] for k in found.place],
            "time": [names.times[k] for k in found.time],
            "weather": [names.weathers[k] for k in found.weather],
        }

    all_names = {
        "kind": names.kinds,
        "colour": names.colours,
        "place": names.places,
        "time": names.times,
        "weather": names.weathers,
    }
    return Judge(all_names, read, {"scorer": str(folder / WEIGHTS), "sha256": sha256(folder / WEIGHTS)})


def write_renders(folder: Path, name: str, count: int, size: tuple[int, int]) -> None:
    """Renders of up to `count` scenes like those of the prompts of one of NAMES, with captions beside them.

    size: (height, width), a square. Raises ModuleNotFoundError without skia.
    """
    with whole_folder(folder) as aside:
        for k, prompt in enumerate(reference_prompts(count, held_out=NAMES[name])):
            path = save_png(Image.fromarray(render(prompt.scene, size[0])), aside / f"{k:05d}.png")
            path.with_suffix(".txt").write_text(prompt.text + "\n", encoding="utf-8")
