"""What the variance of DDPM's steps does: to pictures, and to the bound on held-out latents."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from ldm.diffusion.bound import bits_per_dim, bound
from ldm.diffusion.forward import sigma_log_variances
from ldm.diffusion.guidance import CFG
from ldm.diffusion.methods.ancestral import ddpm
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import Denoise, Denoised, Variance
from ldm.diffusion.variance import LearnedVariance
from ldm.errors import reported
from ldm.evaluate.distances import frechet_distance
from ldm.evaluate.reconstruction import Images, latents_of, to_uint8
from ldm.models.conditioning import Conditioning
from ldm.pipeline import networks
from ldm.postcards.scoring.prompts import Prompt
from ldm.postcards.scoring.sources import picture_size, rendered
from ldm.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline import Pipeline
    from ldm.pipeline.job import Batch, Job
    from ldm.postcards.scoring.scorer import Scorer

BATCH = 16


@dataclass(frozen=True)
class Figures:
    """Of one variance in one number of steps.

    frechet: of the scorer's features, drawn against rendered. bits: of the bound, in bits/dim; steps_bits: of
    its steps alone, without the decoder, which is the same for each variance.
    """

    variance: str
    steps: int
    frechet: float
    bits: float
    steps_bits: float


def variances_of(pipe: Pipeline) -> list[Variance]:
    """Those that the model can be drawn with."""
    return [each for each in get_args(Variance) if each != "learned_range" or pipe.parts.learns_variance]


def draw(
    pipe: Pipeline, prompts: Sequence[Prompt], steps: int, variance: Variance, scale: float | None = None
) -> Images:
    """What DDPM of that variance draws at a guidance scale (None: the model's); prompt i with seed i."""
    parts = []
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        result = pipe(
            [prompt.text for prompt in some],
            seed=list(range(first, first + len(some))),
            sampler=partial(ddpm, variance=variance),
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="pt",
        )
        parts.append(to_uint8(result.images))
    return np.concatenate(parts)


@torch.inference_mode()
def bits_of(pipe: Pipeline, prompts: Sequence[Prompt], steps: int) -> dict[Variance, tuple[float, float]]:
    """(bound, its steps alone) in bits/dim of the latents of the prompts' own renders, by variance."""
    found = {each: [0.0, 0.0] for each in variances_of(pipe)}
    job, x0 = asked(pipe, prompts, steps)
    for batch in job.batches:
        rows, denoise = [each.prompt for each in batch], remembered(denoiser(pipe, job, batch))
        for variance, totals in found.items():
            noise = Noise(rows)  # the same states, so that one answer serves all
            for term in bound(denoise, x0[rows], job.grid.sigmas, noise, variance=variance):
                bits = float(bits_per_dim(term.nats, x0[0].numel()).sum()) / len(prompts)
                totals[0] += bits
                totals[1] += bits if term.name == "step" else 0.0
    return {variance: (total, only) for variance, (total, only) in found.items()}


def asked(pipe: Pipeline, prompts: Sequence[Prompt], steps: int) -> tuple[Job, Tensor]:
    """A drawing of the prompts by DDPM, and the latents of their renders, fp32 [N, c, h, w]."""
    requests = [Request(prompt=each.text, sampler="ddpm", num_inference_steps=steps) for each in prompts]
    job = pipe.prepare(requests, batch_size=BATCH)
    return job, latents_of(pipe, rendered(prompts, picture_size(pipe))).float()


def denoiser(pipe: Pipeline, job: Job, batch: Batch) -> Denoise:
    """The model itself on the prompts of a batch, without guidance."""
    cond = Conditioning.cat([job.encode(picture.prompt, 0)[0] for picture in batch])
    guidance = LearnedVariance(CFG(1.0)) if pipe.parts.learns_variance else CFG(1.0)
    predict = networks.predict(pipe.unet, job.grid, {"cond": cond})
    return guidance(predict, pipe.schedule.prediction.x0)


def remembered(denoise: Denoise) -> Denoise:
    """`denoise` that answers once for each noise level, of whatever state it is asked first."""
    known: dict[float, Denoised] = {}

    def once(x: Tensor, sigma: Tensor) -> Denoised:
        if float(sigma) not in known:
            known[float(sigma)] = denoise(x, sigma)
        return known[float(sigma)]

    return once


@torch.inference_mode()
def learned_shares(pipe: Pipeline, prompts: Sequence[Prompt], steps: int) -> dict[float, float]:
    """What the model has learned: u of equation 15, mean over latents, by timestep but the last."""
    job, x0 = asked(pipe, prompts, steps)
    found = dict.fromkeys(job.grid.timesteps[:-1].tolist(), 0.0)
    for batch in job.batches:
        rows, denoise = [each.prompt for each in batch], denoiser(pipe, job, batch)
        noise = Noise(rows)
        for t, (sigma, sigma_next) in zip(found, pairwise(job.grid.sigmas), strict=False):
            d = denoise(x0[rows] + sigma.to(x0) * noise(x0[rows], 0, 0), sigma)
            assert d.log_variance is not None
            lower, upper = sigma_log_variances(sigma, sigma_next)
            u = (d.log_variance(sigma_next) - lower) / (upper - lower)
            found[t] += float(u.mean()) * len(rows) / len(prompts)
    return found


def measure(
    pipe: Pipeline, scorer: Scorer, prompts: Sequence[Prompt], steps: int, args: argparse.Namespace
) -> list[Figures]:
    """Every variance in so many steps, as the command line asks."""
    wanted, found = scorer.read(rendered(prompts, picture_size(pipe))).features, []
    for variance, (total, only) in bits_of(pipe, prompts[: args.latents], steps).items():
        features = scorer.read(draw(pipe, prompts, steps, variance, args.scale)).features
        found.append(Figures(variance, steps, frechet_distance(wanted, features), total, only))
        print(found[-1], flush=True)
    return found


def main() -> None:
    """The command line of scripts/evaluate_variance.py."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="as for txt2img (default: the embedded model)")
    parser.add_argument("--scorer", type=Path, default=Path("weights/postcard-eval"))
    parser.add_argument("--n", type=int, default=300, help="prompts; default: %(default)s")
    parser.add_argument("--latents", type=int, default=64, help="of the bound; default: %(default)s")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 100])
    parser.add_argument("--scale", type=float, help="guidance scale of what is drawn (default: the model's)")
    parser.add_argument("--out", type=Path, required=True, help="figures go here as JSON")
    with reported():
        _run(parser.parse_args())


def _run(args: argparse.Namespace) -> None:
    from ldm import load
    from ldm.checkpoint.io import write_json
    from ldm.postcards.scoring.prompts import evaluation_prompts
    from ldm.postcards.scoring.scorer import Scorer

    pipe, scorer, prompts = load(args.model), Scorer.load(args.scorer), evaluation_prompts(args.n)
    shares = learned_shares(pipe, prompts[:16], 25) if pipe.parts.learns_variance else {}
    print(shares, flush=True)
    found = [each for n in args.steps for each in measure(pipe, scorer, prompts, n, args)]
    write_json(args.out, {"figures": [asdict(each) for each in found], "u": shares, "prompts": args.n})
