"""Where the pictures that are scored come from: the model, or the truth in place of some of its parts.

If pictures are muddy, these tell which part is at fault: `reconstructed` has the truth for everything but the
VAE, `denoised_from` the truth for the early, large steps of the U-Net.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.diffusion.noise import Noise
from ldm.evaluate.reconstruction import Images, latents_of, to_uint8
from ldm.pipeline import Pipeline
from ldm.postcards.scoring.prompts import Prompt
from ldm.postcards.sprites.mixture import render
from ldm.request import Request


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; None is the model's default. Prompt i is drawn with seed `seed` + i."""

    steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    batch_size: int = 16
    seed: int = 0


OnProgress = Callable[[int], None]  # is given how many pictures are finished


def rendered(prompts: Sequence[Prompt], size: int = 128) -> Images:
    """The prompts' own scenes: what a model without fault could draw."""
    return np.stack([render(prompt.scene, size) for prompt in prompts])


def picture_size(pipe: Pipeline) -> int:
    """The side, in pixels, of what the model draws by default."""
    height = pipe.resolve(Request()).height
    assert height is not None
    return height


def drawn(pipe: Pipeline, prompts: Sequence[Prompt], settings: Settings, on_progress: OnProgress) -> Images:
    """What the model draws from the texts alone."""

    def draw(start: int, part: Sequence[Prompt]) -> Images:
        return _call(pipe, part, _seeds(settings, start, part), settings, num_inference_steps=settings.steps)

    return _in_batches(draw, prompts, settings.batch_size, on_progress)


def filled(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    images: Images,
    masks: NDArray[np.bool_],
    settings: Settings,
    on_progress: OnProgress,
) -> Images:
    """Pictures, one for each prompt, with what masks [N, H, W] cover drawn anew."""

    def draw(start: int, part: Sequence[Prompt]) -> Images:
        own, seeds = slice(start, start + len(part)), _seeds(settings, start, part)
        given = {"image": images[own], "mask_image": masks[own], "num_inference_steps": settings.steps}
        return _call(pipe, part, seeds, settings, **given)

    return _in_batches(draw, prompts, settings.batch_size, on_progress)


def controlled(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    pictures: Images,
    use: Mapping[str, Any],
    settings: Settings,
    on_progress: OnProgress,
) -> Images:
    """Pictures, one for each prompt, with a control picture each: `use` are fields of a `ControlUse`."""

    def draw(start: int, part: Sequence[Prompt]) -> Images:
        control = [{**use, "image": Image.fromarray(pictures[start])}]
        more = {"control": control, "num_inference_steps": settings.steps}
        return _call(pipe, part, _seeds(settings, start, part), settings, **more)

    return _in_batches(draw, prompts, 1, on_progress)  # one control picture is of all of a call


def prompted(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    pictures: Images,
    settings: Settings,
    on_progress: OnProgress,
) -> Images:
    """Pictures, one for each prompt, with one picture each that the pipeline's IP-Adapter reads."""

    def draw(start: int, part: Sequence[Prompt]) -> Images:
        more = {"ip_adapter_image": Image.fromarray(pictures[start]), "num_inference_steps": settings.steps}
        return _call(pipe, part, _seeds(settings, start, part), settings, **more)

    return _in_batches(draw, prompts, 1, on_progress)  # image prompts are of all of a call


def denoised_from(
    pipe: Pipeline, timestep: int, prompts: Sequence[Prompt], settings: Settings, on_progress: OnProgress
) -> Images:
    """What the model makes of the prompts' own renders, noised to `timestep`, with the right texts.

    x = x0 + sigma(timestep) * noise, then the sampler over evenly spaced timesteps down to 0.
    """
    steps = settings.steps or pipe.resolve(Request()).num_steps
    timesteps = [float(t) for t in np.linspace(timestep, 0, steps, endpoint=False)]

    def draw(start: int, part: Sequence[Prompt]) -> Images:
        seeds = _seeds(settings, start, part)
        x0 = latents_of(pipe, rendered(part, picture_size(pipe))).cpu()
        x = x0 + float(job.grid.sigmas[0]) * Noise(seeds).initial(job.start.shape)
        return _call(pipe, part, seeds, settings, timesteps=timesteps, latents=x / job.grid.initial_scale)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the run starts")  # below pure noise: that is the point
        job = pipe.prepare(Request(timesteps=tuple(timesteps), sampler=settings.sampler))
        return _in_batches(draw, prompts, settings.batch_size, on_progress)


def _call(
    pipe: Pipeline, part: Sequence[Prompt], seeds: list[int], settings: Settings, **more: Any
) -> Images:
    result = pipe(
        [prompt.text for prompt in part],
        guidance_scale=settings.guidance_scale,
        sampler=settings.sampler,
        seed=seeds,
        output_type="pt",
        **more,
    )
    return to_uint8(result.images)


def _seeds(settings: Settings, start: int, part: Sequence[Prompt]) -> list[int]:
    return [settings.seed + start + k for k in range(len(part))]


def _in_batches(
    draw: Callable[[int, Sequence[Prompt]], Images],
    prompts: Sequence[Prompt],
    size: int,
    on_progress: OnProgress,
) -> Images:
    parts = []
    for start in range(0, len(prompts), size):
        parts.append(draw(start, prompts[start : start + size]))
        on_progress(start + len(parts[-1]))
    return np.concatenate(parts)
