"""Everything that is measured of a model, and the tables that say it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from ldm.evaluate.distances import frechet_distance, mmd, psnr
from ldm.evaluate.features import ImageTower
from ldm.evaluate.reconstruction import Images, reconstructed
from ldm.evaluate.report import Rate
from ldm.pipeline import Pipeline
from ldm.postcards.scoring.following import following
from ldm.postcards.scoring.prompts import Prompt, digest
from ldm.postcards.scoring.scorer import Instrument, Reading
from ldm.postcards.scoring.sources import (
    OnProgress,
    Settings,
    denoised_from,
    drawn,
    picture_size,
    rendered,
)


@dataclass
class Results:
    """What `measure` found: rates by column and attribute, what was read in each column's pictures, plain
    figures, and the pictures drawn by group.
    """

    table: dict[str, dict[str, Rate]] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    pictures: dict[str, Images] = field(default_factory=dict)


@dataclass(frozen=True)
class Instruments:
    """What pictures are measured with."""

    scorer: Instrument
    tower: ImageTower | None = None


def measure(
    pipe: Pipeline,
    tools: Instruments,
    groups: Mapping[str, Sequence[Prompt]],
    settings: Settings,
    start_from: Sequence[int] = (),
) -> Results:
    """Draw each group's prompts and score them, and beside them their renders and the VAE's reconstructions.

    start_from: timesteps; for each a column of pictures denoised from there on, from renders (fault finding).
    """
    results = Results(facts={"model": pipe.name, "settings": asdict(settings)})
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, prompts in groups.items():
            if prompts:
                _group(_Run(pipe, tools, settings, start_from, progress), name, prompts, results)
    return results


def renders_of(group: str) -> str:
    """The column of what a model without fault draws of a group: what is less than 1 there was misread."""
    return f"renders, {group}"


@dataclass(frozen=True)
class _Run:
    """What all groups share."""

    pipe: Pipeline
    tools: Instruments
    settings: Settings
    start_from: Sequence[int]
    progress: Progress

    def bar(self, title: str, total: int) -> OnProgress:
        """A line of the progress display, to be told how many are finished."""
        task = self.progress.add_task(title, total=total)
        return lambda done: self.progress.update(task, completed=done)


def _group(run: _Run, name: str, prompts: Sequence[Prompt], results: Results) -> None:
    scorer, pipe, settings = run.tools.scorer, run.pipe, run.settings
    began = time.perf_counter()
    pictures = drawn(pipe, prompts, settings, run.bar(name, len(prompts)))
    seconds = time.perf_counter() - began
    renders = rendered(prompts, picture_size(pipe))
    copies = reconstructed(pipe, renders, settings.batch_size)
    columns = {name: pictures, renders_of(name): renders, f"through the VAE, {name}": copies}
    for timestep in run.start_from:
        title = f"from t = {timestep}, {name}"
        bar = run.bar(title, len(prompts))
        columns[title] = denoised_from(pipe, timestep, prompts, settings, bar)
    for title, images in columns.items():
        results.readings[title] = scorer.read(images)
        results.table[title] = following(prompts, results.readings[title], scorer.config)
    results.pictures[name] = pictures
    results.facts[name] = {
        "prompts": len(prompts),
        "prompts_digest": digest(prompts),
        "seconds_per_picture": seconds / len(prompts),
        "vae_psnr_db": float(psnr(renders, copies).mean()),
        **_distances(run.tools, prompts, renders, {"drawn": pictures, "through_vae": copies}),
    }


def _distances(
    tools: Instruments, prompts: Sequence[Prompt], renders: Images, others: dict[str, Images]
) -> dict[str, float]:
    """Of each set to the prompts' renders; `other_renders`, on other backgrounds, show what chance gives."""
    if len(prompts) < 2:
        return {}
    rng = random.Random("other backgrounds")
    again = [replace(prompt, scene=replace(prompt.scene, seed=rng.getrandbits(32))) for prompt in prompts]
    sets = {**others, "other_renders": rendered(again, renders.shape[1])}
    found = {}
    features = tools.scorer.read(renders).features
    for name, images in sets.items():
        found[f"frechet_scorer_{name}"] = frechet_distance(features, tools.scorer.read(images).features)
    if tools.tower is not None:
        embedded = tools.tower.embed(renders)
        for name, images in sets.items():
            found[f"cmmd_clip_{name}"] = 1000 * mmd(embedded, tools.tower.embed(images))
    return found
