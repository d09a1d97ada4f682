"""The drawing of a job, on one page: the first state, the solver's steps, the picture.

The state of a picture lives in sigma space, x = x0 + sigma * noise, in fp32; it is scaled and cast where the
U-Net is called (`ldm.pipeline.networks`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.guidance import Exchangeable, Guidance, composed, divided
from ldm.diffusion.solvers import Step
from ldm.errors import UserError
from ldm.images.pixels import to_pil
from ldm.images.watermark import key_named, mark
from ldm.models.conditioning import Conditioning
from ldm.pipeline import networks
from ldm.pipeline.deciding.passes import Then
from ldm.pipeline.deciding.prepare import prepare
from ldm.pipeline.edit import Invert
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.job import Batch, Job
from ldm.pipeline.steering.perturbed import Middle
from ldm.pipeline.steering.prompt_to_prompt import again
from ldm.pipeline.steering.regions import regional

if TYPE_CHECKING:
    from ldm.checkpoint.beside.safety import SafetyChecker


@dataclass(frozen=True, eq=False)
class Change:
    """What whoever watches a batch wants to be other from the next step on."""

    texts: Mapping[str, Conditioning] = field(default_factory=dict)  # by branch
    guidance: Guidance | None = None  # None: as it is
    stop: bool = False  # keep what is drawn so far


OnStep = Callable[[Step], object]  # what it gives means nothing, unless it is a Change


@dataclass(frozen=True)
class Counted:
    """An OnStep that looks at no values, so that the host need not wait for a card to have them."""

    tell: Callable[[int], object]  # of the step's number

    def __call__(self, step: Step) -> None:
        self.tell(step.i)


class Drawn(NamedTuple):
    """Finished pictures: images [B, 3, H, W] in 0..1, those that are transparent [B, 4, H, W] with alpha, not
    premultiplied; and the batch, with what a checker found in each.
    """

    images: Tensor
    batch: Batch


def draw_batch(job: Job, batch: Batch, on_step: OnStep | None = None) -> Drawn:
    """The pictures of one batch; enlarged where the model has an upscaler, checked where it has a checker."""
    latents = draw_latents(job, batch, on_step)
    start = job.start.rows([picture.prompt for picture in batch])
    images = start.finish(networks.decode(job.model.vae, latents), latents)
    images = images if job.model.upscaler is None else enlarge(job, batch, images)
    if (checker := job.model.safety_checker) is not None:
        images, batch = checked(checker, images, batch)
    images = images if job.request.watermark is None else watermarked(images, job.request.watermark)
    return Drawn(without_background(images, batch) if job.request.transparent else images, batch)


def checked(checker: SafetyChecker, images: Tensor, batch: Batch) -> Drawn:
    """The pictures with those black that are flagged, as in diffusers."""
    flags = checker(to_pil(images))
    black = torch.tensor(flags, device=images.device)[:, None, None, None]
    told = tuple(replace(picture, flagged=flag) for picture, flag in zip(batch, flags, strict=True))
    return Drawn(images.masked_fill(black, 0.0), told)


def watermarked(images: Tensor, name: str) -> Tensor:
    """Images [B, 3, H, W] in 0..1, each marked by the key of that name. Raises UserError."""
    pictures = images.detach().double().cpu().movedim(1, -1).numpy()
    marked = [torch.from_numpy(mark(picture, key_named(name))) for picture in pictures]
    return torch.stack(marked).movedim(-1, 1).to(images)


def without_background(images: Tensor, batch: Batch) -> Tensor:
    """Images [B, 3, H, W] in 0..1 with alpha [B, 4, H, W]: opaque where there is no plain background to leave
    out, which is told, and where a checker made the picture black.
    """
    from ldm.images.keying import keyed

    made = []
    for picture, image in zip(batch, images.detach().double().cpu().movedim(1, -1).numpy(), strict=True):
        found = None if picture.flagged else keyed(image)
        if found is None and not picture.flagged:
            warnings.warn(
                f"seed {picture.seed}: the border of the picture is not plain, and it stays opaque: "
                "ask for such as 'on a plain blue background'",
                stacklevel=2,
            )
        opaque = np.concatenate([image, np.ones_like(image[..., :1])], -1) if found is None else found
        made.append(torch.from_numpy(opaque))
    return torch.stack(made).movedim(-1, 1).to(images)


def draw_latents(job: Job, batch: Batch, on_step: OnStep | None = None) -> Tensor:
    """The latents [B, C, h, w] at the end of one batch, as the VAE decodes them; `on_step` sees each step.

    Where other jobs go on from them, it sees their steps too, with numbers that go on, and changes nothing.
    If it stops the batch, they are those of that step at the network's scale, x / sqrt(sigma^2 + 1).
    """
    looks = on_step is not None and not isinstance(on_step, Counted)
    drawn = None if looks or job.model.device.type == "cpu" else draw_ahead(job, batch, on_step)
    latents, stopped = walk(sample(job, batch), on_step) if drawn is None else drawn
    if stopped:
        return latents
    latents = latents * job.grid.final_scale
    return latents if job.then is None else go_on(job, job.then, batch, latents, on_step)


def walk(steps: Generator[Step, Change | None, None], on_step: OnStep | None) -> tuple[Tensor, bool]:
    """The state that the steps end in; or, as `on_step` stops them, that step's latents and True."""
    change = None
    try:
        while True:
            step = steps.send(change)
            answer = None if on_step is None else on_step(step)
            change = answer if isinstance(answer, Change) else None
            if change is not None and change.stop:
                return step.latents, True
    except StopIteration:
        return step.x, False


def draw_ahead(job: Job, batch: Batch, on_step: OnStep | None) -> tuple[Tensor, bool] | None:
    """`walk` of a batch whose steps nobody looks at: the host tells the card of all, and waits at the end.

    None where an answer of the U-Net was not finite: the batch is to be drawn again, looking at each.
    """
    given = [each.source for each in batch if isinstance(each.source, torch.Generator)]
    states, unread = [each.get_state() for each in given], list[Tensor]()
    with suppress(FloatingPointError):  # of a classifier that was given what is not finite
        drawn = walk(sample(job, batch, unread), on_step)
        if not unread or bool(torch.stack(unread).all()):
            return drawn
    for generator, state in zip(given, states, strict=True):  # which the second drawing begins with
        generator.set_state(state)
    return None


def go_on(job: Job, then: Then, batch: Batch, latents: Tensor, on_step: OnStep | None) -> Tensor:
    """The latents [B, C, h, w] at the end of what goes on from those of a batch of `job`."""
    pictures = [then.job.pictures[job.pictures.index(each)] for each in batch]
    size, seen, drawn = 1 if then.one_by_one else len(batch), len(job.grid.timesteps), list[Tensor]()
    for k in range(0, len(pictures), size):
        own = replace(then.job, start=then.begin(latents[k : k + size]))
        some = tuple(pictures[k : k + size])
        drawn.append(draw_latents(own, some, later(on_step, seen)))
        seen += own.count_steps(some)
    return torch.cat(drawn)


def later(on_step: OnStep | None, seen: int) -> OnStep | None:
    """`on_step` of steps that come after as many others; what it gives changes nothing."""
    if on_step is None:
        return None
    if isinstance(on_step, Counted):
        tell = on_step.tell
        return Counted(lambda i: tell(i + seen))

    def call(step: Step) -> None:
        on_step(replace(step, i=step.i + seen))

    return call


def sample(
    job: Job, batch: Batch, unread: list[Tensor] | None = None
) -> Generator[Step, Change | None, None]:
    """The steps of one batch: the first state, then whatever the solver does with it.

    A Change that is sent to it holds from the next step on. With `unread` no answer of the U-Net is looked
    at: each gives a bool there, whether it is finite (`ldm.runtime.Finite`).
    """
    swap, drawn = job.steering.swap, len(batch)
    batch = batch if swap is None else with_sources(batch)
    noise = job.sampler.noise([picture.source for picture in batch])
    given = [picture.latents for picture in batch if picture.latents is not None]
    prompts = [picture.prompt for picture in batch]
    texts, shares = texts_of(job, batch, 0)
    start = job.start.rows(prompts)
    begun = start.begin(noise, torch.stack(given) if given else None, texts["cond"], texts["uncond"])
    branches, known = begun.branches, begun.known
    beside: list[networks.Beside] = [] if swap is None else [swap.begin(prompts[:drawn], begun.x.device)]
    beside += [Middle()] if job.needs.middle else []
    answering = partial(
        networks.predict,
        grid=job.grid,
        branches=branches,
        tiles=job.tiles,
        savings=job.savings,
        unread=unread,
        attending=(*job.attending, *(each.attending for each in beside)),
        meet=job.steering.freeu,
        controls=job.controls,
    )
    predict = answering(job.model.unet)
    if job.needs.empty:
        tell(branches, texts)
    if job.needs.networks:
        predict = divided(predict, {way: answering(unet) for way, unet in job.needs.networks.items()})
    if shares is not None or job.steering.areas is not None:
        tell(branches, texts)
    predict = predict if shares is None else composed(predict, shares.to(begun.x.device))
    predict = predict if job.steering.areas is None else regional(predict, job.steering.areas.to(begun.x))
    for each in beside:
        predict = each.around(predict)
    schedule = job.model.schedule
    guided = Exchangeable(job.guidance(predict, schedule.prediction.x0))
    denoise = guided if schedule.bounds is None else schedule.bounded(guided, job.sampler)
    denoise = denoise if known is None else known.around(denoise)
    solver = job.sampler.solver
    if isinstance(start, Invert):
        solver = start.solver(predict, schedule.prediction.x0)
    told = 0  # the place in the grid whose texts the branches have: not every solver stops at each
    for step in solver(denoise, begun.x, job.grid.sigmas, noise, **job.options):
        step = step if known is None else known.put_back(step)
        change = yield step if swap is None else replace(step, x=step.x[-drawn:], x0=step.x0[-drawn:])
        if any(job.encode(p, step.i + 1) is not job.encode(p, told) for p in prompts):
            tell(branches, texts_of(job, batch, step.i + 1)[0])
            told = step.i + 1
        if change is not None:
            if change.texts and swap is not None:
                raise UserError("a callback cannot replace the texts of an edit between two prompts")
            tell(branches, change.texts)
            if change.guidance is not None:
                guided.current = change.guidance(predict, schedule.prediction.x0)


def texts_of(job: Job, batch: Batch, step: int) -> tuple[dict[str, Conditioning], Tensor | None]:
    """What a batch is told in a step, a row for each picture: "cond", "uncond" and "image", which is without
    the text too; where guidance wants it "empty", of no words at all; of regions "region_0" and so on; and
    where prompts are composed "cond_1" and so on, with the shares [B, K] of all, else None.
    """
    shares = [job.encode.shares(picture.prompt) for picture in batch]
    told = [job.encode(picture.prompt, step, picture.is_source) for picture in batch]
    most = max(map(len, shares))
    uncond = Conditioning.cat([each for _, each in told])
    texts = {"uncond": uncond, "image": uncond}
    if job.needs.empty:
        texts["empty"] = Conditioning.cat([job.encode.empty(picture.prompt, step) for picture in batch])
    for k in range(most):  # of fewer the first stands in the others' place, with no share
        at = [k if k < len(own) else 0 for own in shares]
        rows = [cond[i : i + 1] for i, (cond, _) in zip(at, told, strict=True)]
        texts[f"cond_{k}" if k else "cond"] = Conditioning.cat(rows)
    for k in range(len(job.request.regions or ())):
        at = [len(own) + k for own in shares]
        texts[f"region_{k}"] = Conditioning.cat(
            [cond[i : i + 1] for i, (cond, _) in zip(at, told, strict=True)]
        )
    if all(each == (1.0,) for each in shares):
        return texts, None
    return texts, torch.tensor([[*each, *[0.0] * (most - len(each))] for each in shares])


def with_sources(batch: Batch) -> Batch:
    """A batch of edits between two prompts: first the pictures that they were, of the same noise."""
    sources = (replace(each, is_source=True, source=again(each.source)) for each in batch)
    return (*sources, *batch)


def tell(branches: dict[str, Conditioning], texts: Mapping[str, Conditioning]) -> None:
    """Put other texts into the branches; what is concatenated with the latents stays.

    One that is new has what "cond" has. "image" is a branch of instruct-pix2pix alone.
    """
    for name, each in texts.items():
        if name != "image" or name in branches:
            branches[name] = replace(each, concat=branches.get(name, branches["cond"]).concat)


def enlarge(job: Job, batch: Batch, images: Tensor) -> Tensor:
    """What the upscaler makes of finished pictures, [B, 3, H, W] in 0..1, one by one, as of their PNGs."""
    upscaler, large = job.model.upscaler, []
    assert upscaler is not None
    for picture, image in zip(batch, (images * 255).round() / 255, strict=True):
        small = picture.request
        assert small.upscaling is not None
        said = {"prompt": small.shown, "prompt_grammar": small.prompt_grammar, "drawn_as": small.drawn_as}
        asked = small.upscaling.replace(**said, seeds=small.seeds)
        own = prepare(upscaler, asked, Inputs(image=image))
        large += [draw_batch(own, each).images for each in own.batches]
    return torch.cat(large)
