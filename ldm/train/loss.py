"""The diffusion loss: which noise levels the U-Net is trained at, what it is asked, how its error counts.

A training step, with the names of this file::

    p = timestep_probabilities(options, steps)
    t = draw_timesteps(p, batch_size, rng)
    noise, input_noise = draw_noise(x0.shape, options, rng)
    output = unet(noisy_latents(x0, input_noise, t, levels), t, tokens)
    losses = pixel_losses(output, training_target(x0, noise, t, levels), options).mean((1, 2))
    loss = (levels.weight[t] * losses).mean()

What is random is drawn on the CPU from one generator; the rest are functions of tensors on any device, and
of `Levels`, which are made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.train.loss_recipe import LossSection

# Uniform timesteps, unit noise, square error: L_simple of Ho et al. 2020 (arXiv 2006.11239), eq. 14.
PLAIN_LOSS = LossSection()

# --- timesteps ---------------------------------------------------------------------------------------------


def timestep_probabilities(options: LossSection, steps: int) -> Tensor:
    """How often each of the schedule's `steps` timesteps is trained on: float64 [T], sums to 1.

    - uniform: alike from `min_timestep` to before `max_timestep`.
    - logit_normal: ``t = floor(T sigmoid(n))``, n normal with `logit_mean`, `logit_std`, stretched over the
      range: exact, as differences of the normal CDF. Esser et al. 2024 (arXiv 2403.03206), section 3.1.
    - importance: in proportion to `timestep_histogram`, bins of equal width over all T; see `sample_weights`.
    - loss_second_moment: as uniform, until there are losses (`ldm.train.variance`).

    Raises:
        UserError: for a range that reaches beyond the schedule.
    """
    low, high = options.min_timestep, options.max_timestep or steps
    if not low < high <= steps:
        raise UserError(
            f"timesteps {low} to before {high}: the model has {steps}; change min_timestep, max_timestep"
        )
    inside = torch.ones(high - low, dtype=torch.float64)
    if options.timestep_sampling == "logit_normal":
        edges = torch.linspace(0, 1, high - low + 1, dtype=torch.float64)
        standard = (torch.logit(edges) - options.logit_mean) / options.logit_std
        inside = torch.special.ndtr(standard).diff()
    elif options.timestep_sampling == "importance":
        histogram = torch.tensor(options.timestep_histogram, dtype=torch.float64)
        inside = histogram[torch.arange(low, high) * len(histogram) // steps]
    return F.pad(inside / inside.sum(), (low, steps - high))


def draw_timesteps(probabilities: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Timesteps int64 [count] by `probabilities` [T]."""
    return timesteps_at(probabilities, torch.rand(count, generator=rng, dtype=torch.float64))


def timesteps_at(probabilities: Tensor, u: Tensor) -> Tensor:
    """Timesteps int64 [B] for `u` [B] in 0..1: the inverse of the distribution of `probabilities` [T]."""
    cdf = probabilities.cumsum(0)
    return torch.searchsorted(cdf / cdf[-1], u, right=True)


# --- noise -------------------------------------------------------------------------------------------------


def draw_noise(
    shape: torch.Size | tuple[int, ...], options: LossSection, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(what the target speaks of, what the latents are mixed with), fp32 [B, C, H, W] on the CPU.

    They differ by input perturbation, ``noise + gamma * other``: Ning et al. 2023 (arXiv 2301.11706),
    algorithm 1. `noise_offset` adds unit noise times itself to each whole channel, as in diffusers' scripts:
    Guttenberg 2023, "Diffusion with Offset Noise". Without options both are unit noise, and the same tensor.
    """
    noise = pyramid_noise(shape, options.multires_noise_discount, rng)
    if options.noise_offset:
        noise = noise + options.noise_offset * torch.randn(*shape[:2], 1, 1, generator=rng)
    if not options.input_perturbation:
        return noise, noise
    return noise, noise + options.input_perturbation * torch.randn(shape, generator=rng)


def pyramid_noise(shape: torch.Size | tuple[int, ...], discount: float, rng: torch.Generator) -> Tensor:
    """Unit noise with more of it at low frequencies, fp32 [B, C, H, W]; `discount` 0 gives plain unit noise.

    Level k has 1 / 2^k of the size, is enlarged bilinearly, and has the weight discount^k. Whitaker 2023,
    "Multi-Resolution Noise for Diffusion Model Training", where sizes fall by random factors and the batch is
    divided by its standard deviation: here every level, and so the sum, has variance 1 at every pixel.
    """
    height, width = shape[2:]
    noise, power = torch.randn(shape, generator=rng), 1.0
    levels = min(height, width).bit_length() if discount else 1
    for k in range(1, levels):
        coarse = torch.randn(*shape[:2], height >> k, width >> k, generator=rng)
        rows, columns = _enlarging(height >> k, height), _enlarging(width >> k, width)
        noise = noise + discount**k * (rows @ coarse @ columns.T)
        power += discount ** (2 * k)
    return noise / math.sqrt(power)


def _enlarging(small: int, large: int) -> Tensor:
    """[large, small]: bilinear along one side, each row scaled so that it keeps the variance of noise."""
    columns = F.interpolate(torch.eye(small)[None], size=large, mode="linear")[0]
    return F.normalize(columns.T, dim=1)


# --- input and target --------------------------------------------------------------------------------------


class Levels(nn.Module):
    """What a schedule says of each training timestep, fp32 [T]: buffers, which go where their task goes.

    signal: sqrt(a), a = alphas_cumprod; noise: sqrt(1 - a); sigma: their ratio, 1e10 without a signal.
    weight: how much a sample counts, `sample_weights`; 1 without options.
    """

    signal: Tensor
    noise: Tensor
    sigma: Tensor
    weight: Tensor

    def __init__(self, schedule: Schedule, options: LossSection | None = None) -> None:
        super().__init__()
        a, self.prediction = schedule.alphas_cumprod, schedule.prediction
        weight = torch.ones_like(a) if options is None else sample_weights(schedule, options)
        sigma = schedule.sigma(torch.arange(len(a)))
        for name, table in {
            "signal": a.sqrt(),
            "noise": (1 - a).sqrt(),
            "sigma": sigma,
            "weight": weight,
        }.items():
            self.register_buffer(name, table.float(), persistent=False)  # no part of a run's state


def noisy_latents(x0: Tensor, noise: Tensor, t: Tensor, levels: Levels) -> Tensor:
    """The U-Net's input ``sqrt(a) x0 + sqrt(1 - a) noise``, a = alphas_cumprod[t]; Ho et al. 2020, eq. 4.

    At zero terminal SNR the last timestep is exactly `noise`.

    Args:
        x0: clean latents [B, C, H, W]; noise: the same shape.
        t: timesteps, int64 [B].
    """
    return _wide(levels.signal[t]) * x0 + _wide(levels.noise[t]) * noise


def training_target(x0: Tensor, noise: Tensor, t: Tensor, levels: Levels) -> Tensor:
    """What the U-Net should answer: `Prediction.target`, shapes as above; of pure noise, v is ``-x0``."""
    return levels.prediction.target(x0, noise, _wide(levels.sigma[t]))


def _wide(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return x[:, None, None, None]


# --- loss --------------------------------------------------------------------------------------------------


def pixel_losses(output: Tensor, target: Tensor, options: LossSection) -> Tensor:
    """The error's loss in fp32, mean over channels: [B, C, H, W] twice -> [B, H, W].

    l2: ``e^2``. huber: ``2 c (sqrt(e^2 + c^2) - c)`` with c = `huber_c`, which is e^2 for small errors and
    2 c |e| for large ones, so that a broken picture weighs less: Khrapov et al. 2024 (arXiv 2403.16728).
    """
    loss = (output.float() - target.float()).square()
    if options.loss_type == "huber":
        c = options.huber_c
        loss = 2 * c * loss / ((loss + c**2).sqrt() + c)  # the same, without a difference of near equals
    return loss.mean(1)


def denoising_losses(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    levels: Levels,
    options: LossSection = PLAIN_LOSS,
    input_noise: Tensor | None = None,
) -> Tensor:
    """`pixel_losses` of what `predict(noisy latents, t)`, the U-Net, answers to noisy `x0`: [B, H, W].

    Args:
        x0: clean latents [B, C, H, W]; noise, that the target speaks of: the same shape.
        t: timesteps, int64 [B].
        input_noise: what the latents are mixed with, where it is not `noise`.
    """
    noisy = noisy_latents(x0, noise if input_noise is None else input_noise, t, levels)
    return pixel_losses(predict(noisy, t), training_target(x0, noise, t, levels), options)


def sample_weights(schedule: Schedule, options: LossSection) -> Tensor:
    """How much a sample at each timestep counts: float64 [T].

    The product of min-SNR's weight and, for importance sampling, ``1 / (n p(t))`` over n timesteps of
    probability p: the expected loss is then that of uniform sampling, whatever the histogram.
    """
    table = torch.ones_like(schedule.alphas_cumprod)
    if options.timestep_sampling == "importance":
        p = timestep_probabilities(options, len(table))
        table = torch.where(p > 0, 1 / (p * (p > 0).sum()), 0.0)
    if options.snr_gamma is not None:
        table = table * min_snr_weights(schedule.alphas_cumprod, options.snr_gamma, schedule.prediction)
    return table


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Min-SNR weights at signal powers `alphas_cumprod`, of the same shape.

    Hang et al. 2023 (arXiv 2303.09556), section 3.4: with SNR = a / (1 - a), the error of x0 counts
    ``min(SNR, gamma)``, that of eps this over SNR, that of v this over SNR + 1. By
    ``m = gamma / max(a, gamma (1 - a))`` these are ``a m``, ``(1 - a) m`` and ``a (1 - a) m``, finite from
    a = 0 (zero terminal SNR: 0, 1 and 0) to a = 1 (gamma, 0 and 0).
    """
    a, b = alphas_cumprod, 1 - alphas_cumprod
    m: Tensor = gamma / torch.maximum(a, gamma * b)
    match prediction:
        case Prediction.EPSILON:
            return b * m
        case Prediction.V:
            return a * b * m
        case _:
            return a * m


def prior_preservation_loss(losses: Tensor, prior_loss_weight: float) -> Tensor:
    """Mean of the first half of `losses` [2 B], plus `prior_loss_weight` times that of the second: a scalar.

    The first half are the user's pictures, the second ones that the model drew of their class. Ruiz et al.
    2023 (DreamBooth, arXiv 2208.12242), equation 2.
    """
    instance, prior = losses.view(2, -1).unbind()
    return instance.mean() + prior_loss_weight * prior.mean()
