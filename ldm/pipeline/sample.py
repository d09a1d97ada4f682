"""The drawing of a job, on one page: the first state, the solver's steps, the picture.

The state of a picture lives in sigma space, x = x0 + sigma * noise, in fp32; it is scaled and cast where the
U-Net is called (`ldm.pipeline.networks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ldm.diffusion.solvers import Step
from ldm.models.conditioning import Conditioning
from ldm.pipeline import networks
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.job import Batch, Job, prepare

OnStep = Callable[[Step], object]


def draw_batch(job: Job, batch: Batch, on_step: OnStep | None = None) -> Tensor:
    """The images [B, 3, H, W] in 0..1 of one batch, enlarged where the model has an upscaler."""
    latents = draw_latents(job, batch, on_step)
    images = job.start.finish(networks.decode(job.model.vae, latents))
    return images if job.model.upscaler is None else enlarge(job, batch, images)


def draw_latents(job: Job, batch: Batch, on_step: OnStep | None = None) -> Tensor:
    """The latents [B, C, h, w] at the end of one batch, as the VAE decodes them; `on_step` sees each step."""
    for step in sample(job, batch):
        if on_step is not None:
            on_step(step)
    return step.x * job.grid.final_scale


def sample(job: Job, batch: Batch) -> Iterator[Step]:
    """The steps of one batch: the first state, then whatever the solver does with it."""
    noise = job.sampler.noise([picture.source for picture in batch])
    given = [picture.latents for picture in batch if picture.latents is not None]
    cond, uncond = zip(*(job.encode(picture.prompt) for picture in batch), strict=True)
    x, branches = job.start.begin(
        noise, torch.stack(given) if given else None, Conditioning.cat(cond), Conditioning.cat(uncond)
    )
    predict = networks.predict(job.model.unet, job.grid, branches)
    schedule = job.model.schedule
    denoise = schedule.bounded(job.guidance(predict, schedule.prediction.x0), job.sampler)
    return job.sampler.solver(denoise, x, job.grid.sigmas, noise, **job.options)


def enlarge(job: Job, batch: Batch, images: Tensor) -> Tensor:
    """What the upscaler makes of finished pictures, [B, 3, H, W] in 0..1, one by one, as of their PNGs."""
    upscaler, large = job.model.upscaler, []
    assert upscaler is not None
    for picture, image in zip(batch, (images * 255).round() / 255, strict=True):
        small = picture.request
        assert small.upscaling is not None
        asked = small.upscaling.replace(prompt=small.prompt, seeds=small.seeds)
        own = prepare(upscaler, asked, Inputs(image=image))
        large += [draw_batch(own, each) for each in own.batches]
    return torch.cat(large)
