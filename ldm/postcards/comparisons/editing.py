"""Edits by inversion, measured: does the picture show what was asked, and is the rest as it was?

Renders whose scene is known are edited in one attribute of four: the thing's colour, its kind, the time of
day or the place. Beside it image to image, which knows no source, and both inversions of the source.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from ldm import postcards as world
from ldm.diffusion.guidance import CFG
from ldm.diffusion.inversion import ddim_invert
from ldm.diffusion.methods.ancestral import ancestral
from ldm.diffusion.noise import Noise
from ldm.evaluate.distances import psnr
from ldm.evaluate.report import Rate, rate
from ldm.images.pixels import contact_sheet, to_pil
from ldm.pipeline import Inputs, Pipeline, networks
from ldm.postcards.scoring.following import judge
from ldm.postcards.scoring.prompts import state
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.vocabulary import SHAPES, places_for
from ldm.request import Request

WHAT = ("colour", "kind", "time", "place")
Images = NDArray[np.uint8]  # [B, H, W, 3]


@dataclass(frozen=True)
class Case:
    """A scene, and the one it is to become, which differs in `what`."""

    what: str
    source: world.Scene
    target: world.Scene

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Where the edit has no business: beside a thing that changes; else the thing itself."""
        before, after = (world.object_mask(scene) for scene in (self.source, self.target))
        if self.what in ("time", "place"):
            return before
        around = torch.from_numpy(before | after)[None].float()
        return np.asarray(F.max_pool2d(around, 9, 1, 4)[0].numpy() == 0)


def sample_cases(count: int) -> list[Case]:
    """Single things, the four kinds of edit in turn; the same in every process."""
    rng, cases = random.Random("edits"), list[Case]()
    while len(cases) < count:
        scene, what = world.sample_scene(rng, compositions={"one": 1}), WHAT[len(cases) % len(WHAT)]
        others = list(_others(scene, what))
        if others:
            cases.append(Case(what, scene, rng.choice(others)))
    return cases


def _others(scene: world.Scene, what: str) -> Iterator[world.Scene]:
    """The scenes that differ in one attribute, and that the world has."""
    (thing,) = scene.groups
    if what in ("colour", "kind"):
        for value in world.COLOURS if what == "colour" else world.KINDS:
            changed: dict[str, Any] = {what: value}
            other = replace(thing, **changed)
            fits = SHAPES[other.kind].realm == SHAPES[thing.kind].realm and scene.place in places_for(
                other.kind
            )
            if other != thing and fits and not world.is_held_out(other.kind, other.colour):
                yield replace(scene, groups=(other,))
    elif what == "time":
        yield from (replace(scene, time=time) for time in world.TIMES if time != scene.time)
    else:  # nothing that stands on land at sea
        yield from (replace(scene, place=p) for p in places_for(thing.kind) if p not in (scene.place, "sea"))


def renders(cases: Sequence[Case]) -> Images:
    """The sources, [B, 128, 128, 3]."""
    return np.stack([world.render(case.source) for case in cases])


def edited(pipe: Pipeline, cases: Sequence[Case], **arguments: Any) -> Images:
    """What becomes of each source as an edit; in steps, strength and so on as `arguments` say."""
    captions = {
        "prompt": [world.full_caption(case.source) for case in cases],
        "target_prompt": [world.full_caption(case.target) for case in cases],
    }
    return _drawn(pipe, cases, captions, arguments)


def image_to_image(pipe: Pipeline, cases: Sequence[Case], **arguments: Any) -> Images:
    """What image to image makes of each source under the target's caption."""
    captions = {"prompt": [world.full_caption(case.target) for case in cases]}
    return _drawn(pipe, cases, captions, arguments)


def _drawn(
    pipe: Pipeline,
    cases: Sequence[Case],
    captions: Mapping[str, Sequence[str]],
    arguments: Mapping[str, Any],
    batch: int = 12,
) -> Images:
    drawn: list[Image.Image] = []
    for i in range(0, len(cases), batch):
        images = [Image.fromarray(image) for image in renders(cases[i : i + batch])]
        texts: dict[str, Any] = {name: each[i : i + batch] for name, each in captions.items()}
        drawn += pipe(image=images, seed=range(i, i + len(images)), **texts, **arguments).images
    return np.stack([np.asarray(image) for image in drawn])


def reconstructed(pipe: Pipeline, case: Case, steps: int) -> tuple[Images, list[float]]:
    """The VAE's picture of a source, and those of DDIM's inversion and the exact one under its own caption.

    [3, H, W, 3], and how far the two's latents are from the VAE's: the largest difference, of its largest.
    """
    caption, inputs = world.full_caption(case.source), Inputs(image=Image.fromarray(renders([case])[0]))
    asked = Request(prompt=caption, target_prompt=caption, guidance_scale=1, num_inference_steps=steps)
    white = Image.new("L", (8, 8), 255)  # nothing is kept for its own sake
    job = pipe.prepare(asked, replace(inputs, mask_image=white))
    begun = job.start.rows([0]).begin(Noise([0]), None, *job.encode(0, 0))
    denoise = CFG(1.0)(networks.predict(pipe.unet, job.grid, begun.branches), pipe.schedule.prediction.x0)
    x0 = begun.x
    noise = ddim_invert(denoise, x0, job.grid.sigmas)
    *_, step = ancestral(denoise, noise, job.grid.sigmas, Noise([0]), eta=0.0)
    latents = [x0, step.x, pipe.draw(job, output_type="latent").images]
    errors = [float((each - x0).abs().max() / x0.abs().max()) for each in latents[1:]]
    return np.stack([np.asarray(each) for each in to_pil(pipe.decode(torch.cat(latents)))]), errors


def measured(scorer: Scorer, cases: Sequence[Case], drawn: Images) -> dict[str, tuple[Rate, float]]:
    """By what was changed: how many show all that the target's caption says; the mean PSNR of what is kept.

    The PSNR in dB is over the pixels of `Case.kept`, against the target's render: there it is the source's,
    but for the light of another time of day.
    """
    read, wanted = scorer.read(drawn), [world.render(case.target) for case in cases]
    figures = {}
    for what in dict.fromkeys(case.what for case in cases):
        of = [i for i, case in enumerate(cases) if case.what == what]
        prompts = {i: state(world.full_caption(cases[i].target), cases[i].target) for i in of}
        right = rate(all(ok for _, ok in judge(prompts[i], read, i, scorer.config)) for i in of)
        kept = [psnr(*(image[cases[i].kept][None, None] for image in (wanted[i], drawn[i]))) for i in of]
        figures[what] = right, float(np.minimum(np.concatenate(kept), 60.0).mean())  # none is infinitely good
    return figures


def sheet(pipe: Pipeline, cases: Sequence[Case], rows: Sequence[Images], steps: int) -> Image.Image:
    """A row a case: source, by DDIM's inversion, by the exact one, its picture in each of `rows`."""
    again = np.stack([reconstructed(pipe, case, steps)[0] for case in cases])
    columns = [renders(cases), again[:, 1], again[:, 2], *rows]
    pictures = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    return contact_sheet([Image.fromarray(each) for each in pictures], len(columns))
