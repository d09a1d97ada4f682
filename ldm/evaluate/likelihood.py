"""How likely a text-to-image model finds pictures, under prompts and without.

A picture's latents are a draw of what the VAE encodes it to, with the noise of training's lowest level:
``z = z_0 + sigma_min noise``, the cleanest state that the network knows. Two figures of ``log p(z)``:

- `log_likelihoods`: by the probability-flow ODE, which the network's gradients are needed for.
- `denoising_bounds`: from below, by the error of the network's noise estimate; no gradients, some levels.

Prompts of one call are judged by the same z, the same noise and the same random vectors. So differences
between them are far more certain than the figures themselves, and that is what classification asks for: of
equally likely prompts, ``p(prompt | picture) = softmax(log p(z | prompt))`` (Li et al. 2023, "Your Diffusion
Model is Secretly a Zero-Shot Classifier", equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.diffusion.likelihood import Likelihood, Trace, log_likelihood
from ldm.diffusion.noise import Noise
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoise
from ldm.errors import UserError
from ldm.images.fitting import take
from ldm.images.pixels import to_tensor
from ldm.models import LatentDist
from ldm.models.conditioning import Conditioning
from ldm.models.kind import Kind
from ldm.pipeline import Pipeline, networks
from ldm.pipeline.deciding.prepare import prepare
from ldm.request import Request

CONTENT = (0.3, 3.0)  # noise levels at which it is decided what is in a picture
Picture = Image.Image | Tensor  # a tensor is latents as the U-Net has them, [1, c, h, w]


def log_likelihoods(
    pipe: Pipeline,
    picture: Picture,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    trace: Trace = "rademacher",
    probes: int = 2,
    rtol: float = 1e-3,
) -> list[Likelihood]:
    """log p of a picture's latents under each prompt ("" is none), by the probability-flow ODE.

    From the lowest to the highest finite level of the schedule, where all is noise. In bf16 the figures
    are some nats off: load the pipeline in fp32.

    Args:
        picture: fitted to the model's own size by `fit`; latents are taken as they are.
        seed: of the latents' noise and of the random vectors.
        trace, probes: as for `ldm.diffusion.likelihood.log_likelihood`.
        rtol: of the solver; on the embedded model 1e-3 is some nats from 1e-5, and two probes err by tens.

    Raises:
        UserError: for a model that does not draw from text alone, latents of another shape or with NaN, and a
            tolerance that is missed.
    """
    z_0, noise = latents_of(pipe, picture, seed)
    low, high = ends(pipe.schedule)
    z = z_0 + low * noise(z_0, low, 0.0)
    # Vectors that were the latents' own noise would find more in the Jacobian than is there.
    probe_seed = int(torch.randint(2**31, (), generator=noise.generators[0]))
    found = []
    for prompt in prompts:
        _, (only,) = under(pipe, [prompt], size_of(pipe, z_0))
        found.append(
            log_likelihood(
                only.denoise, z, low, high, trace=trace, probes=probes, seed=probe_seed, rtol=rtol, atol=rtol
            )
        )
    return found


def denoising_bounds(
    pipe: Pipeline,
    picture: Picture,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    levels: int = 32,
    noises: int = 2,
) -> list[Likelihood]:
    """What log p of a picture's latents under each prompt is at least, by the error of denoising.

    ``-log p(z) <= KL + integral E |noise - estimate|^2 d log sigma + d/2 log(2 pi e sigma_min^2)``: the bound
    of Kingma et al. 2021, equation 17, written in log sigma, where its weight on the noise's error is 1. Each
    estimate takes one noise at each of `levels` levels, evenly spaced in log sigma from a random start.

    Arguments and errors as for `log_likelihoods`.
    """
    z_0, noise = latents_of(pipe, picture, seed)
    low, high = ends(pipe.schedule)
    errors = noise_errors(pipe, z_0, prompts, noise, levels, noises, (low, high))
    dims = z_0.numel()
    entropy = dims / 2 * math.log(2 * math.pi * math.e * low**2)
    power = float(z_0.double().square().sum()) / dims
    prior = dims / 2 * ((high**2 + power) / (1 + high**2) - 1 - math.log(high**2 / (1 + high**2)))
    return [Likelihood(tuple((-row - prior - entropy).tolist()), levels * noises, dims) for row in errors]


def content_errors(
    pipe: Pipeline, picture: Picture, prompts: Sequence[str], *, seed: int = 0, levels: int = 8
) -> list[float]:
    """What the noise levels at which content is decided add to a picture's bound under each prompt, in nats.

    A likelihood is mostly of fine detail, and finds plain pictures likely whatever they show. From sigma 0.3
    to 3 (`CONTENT`) detail is gone and the layout is not yet free: there foreign things stand out, and kinds
    of thing are told best. Latents are taken to have about unit variance, as all models' do.

    Arguments and errors as for `denoising_bounds`.
    """
    z_0, noise = latents_of(pipe, picture, seed)
    return [float(row) for row in noise_errors(pipe, z_0, prompts, noise, levels, 1, CONTENT)[:, 0]]


def posterior(found: Sequence[Likelihood]) -> list[float]:
    """The probabilities of the prompts, were they equally likely before: Bayes' rule, ``softmax(log p)``."""
    return torch.tensor([each.nats for each in found], dtype=torch.float64).softmax(0).tolist()


# --- what they are made of -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Under:
    """The denoiser of states [len(rows), C, H, W], each under the prompt of its row."""

    rows: list[int]
    denoise: Denoise


def under(
    pipe: Pipeline, prompts: Sequence[str], size: tuple[int, int], steps: int | None = None
) -> tuple[Tensor, list[Under]]:
    """Noise levels, and the denoisers of the conditional model (no guidance), as many rows as memory holds.

    Args:
        size: (height, width) of the pictures, in pixels.
        steps: of the DDPM sampler whose levels they are, evenly spaced; by default all of training's.

    Returns:
        levels [steps + 1], falling, float64, with a last 0; and the groups of rows.

    Raises:
        UserError: for a model that does not draw from text alone.
    """
    check_kind(pipe)
    height, width = size
    shared = Request(
        height=height,
        width=width,
        sampler="ddpm",
        spacing="linspace",
        num_inference_steps=steps or len(pipe.schedule.alphas_cumprod),
        guidance_scale=1.0,
        prompt_grammar="plain",  # a caption is one text
    )
    job = prepare(pipe, [shared.replace(prompt=prompt) for prompt in prompts])
    groups = []
    for batch in job.batches:
        rows = [picture.prompt for picture in batch]
        cond = Conditioning.cat([job.encode(p, 0)[0] for p in rows])
        predict = networks.predict(job.model.unet, job.grid, {"cond": cond}, gradients=True)
        groups.append(Under(rows, job.guidance(predict, pipe.schedule.prediction.x0)))
    return job.grid.sigmas, groups


def ends(schedule: Schedule) -> tuple[float, float]:
    """The lowest and the highest finite noise level of training: with zero terminal SNR the last but one."""
    last = len(schedule.alphas_cumprod) - 1
    return float(schedule.sigma(0)), float(schedule.sigma(last - schedule.zero_terminal_snr))


def fit(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """[1, 3, H, W] in 0..1: resized until it covers `size` (Lanczos), and its middle, as training crops."""
    image = take(picture, 3)
    assert isinstance(image, Image.Image)
    return to_tensor(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))


def noise_errors(
    pipe: Pipeline,
    z_0: Tensor,
    prompts: Sequence[str],
    noise: Noise,
    levels: int,
    noises: int,
    ends: tuple[float, float],
) -> Tensor:
    """Estimates of ``integral of E |noise - estimate|^2 d log sigma`` between two levels: [prompts, noises].

    Each has one noise at each of `levels` levels, evenly spaced in log sigma from a random start.
    """
    _, groups = under(pipe, prompts, size_of(pipe, z_0))
    low, span = ends[0], math.log(ends[1] / ends[0])
    errors = torch.zeros(len(prompts), noises, dtype=torch.float64)
    shifts = torch.rand(noises, generator=noise.generators[0]).tolist()
    with torch.no_grad():
        for j, shift in enumerate(shifts):
            for i in range(levels):
                sigma = torch.tensor(low * math.exp(span * (i + shift) / levels), dtype=torch.float64)
                x = z_0 + sigma.to(z_0) * noise(z_0, float(sigma), 0.0)
                for group in groups:
                    guess = group.denoise(x.expand(len(group.rows), -1, -1, -1), sigma).x0
                    error = ((guess - z_0).double() / float(sigma)).square().sum((1, 2, 3))
                    errors[group.rows, j] += span / levels * error.cpu()
    return errors


def check_kind(pipe: Pipeline) -> None:
    """Raise UserError for a model that does not draw from text alone."""
    if pipe.kind is not Kind.TEXT:
        raise UserError(f"{pipe.name} does not draw from text alone: it gives pictures no likelihood")


def own_size(pipe: Pipeline) -> tuple[int, int]:
    """(height, width) in pixels of what the model draws by default. Raises UserError as `check_kind`."""
    check_kind(pipe)
    return pipe.resolve(Request()).size


def size_of(pipe: Pipeline, latents: Tensor) -> tuple[int, int]:
    """(height, width) in pixels of the picture that they are decoded to."""
    return latents.shape[-2] * pipe.vae.downscale, latents.shape[-1] * pipe.vae.downscale


def latents_of(pipe: Pipeline, picture: Picture, seed: int) -> tuple[Tensor, Noise]:
    """A draw of the latents z_0 [1, c, h, w], fp32, and the noise that goes on where that draw left off.

    Raises UserError for latents of another shape, or with NaN.
    """
    noise, channels = Noise([seed]), pipe.vae.latent_channels
    if not isinstance(picture, Tensor):
        encoded = pipe.encode(fit(picture, own_size(pipe)))
    else:
        encoded = LatentDist(picture.to(pipe.device, torch.float32), torch.zeros(()))
    if encoded.mean.ndim != 4 or encoded.mean.shape[:2] != (1, channels):
        raise UserError(f"latents {list(encoded.mean.shape)} are not allowed: give [1, {channels}, h, w]")
    if not bool(encoded.mean.isfinite().all()):
        raise UserError("these latents hold NaN or Inf: they have no likelihood")
    shape = tuple(encoded.mean.shape[1:])
    return encoded.sample(noise.initial(shape)), noise  # type: ignore[arg-type]
