"""Teaching a network its variance: the bound as a loss, and which timesteps it is drawn at.

With ``L_t`` a term of the variational bound (`ldm.diffusion.bound`) on the schedule's own steps, one for each
timestep, and ``p(t)`` how often t is trained on::

    L_vlb = sum of L_t = E[L_t / p(t)]              estimated by one t for each picture
    L_hybrid = L_simple + variance_weight * L_vlb   with the mean as a constant in L_vlb

Nichol and Dhariwal 2021, "Improved DDPM" (arXiv 2102.09672), equations 16 and 18.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm.diffusion.bound import bits_per_dim
from ldm.diffusion.forward import Gaussian, interpolated_log_variance, log_variances
from ldm.diffusion.schedule import Schedule
from ldm.train.loss import (
    PLAIN_LOSS,
    Levels,
    draw_timesteps,
    pixel_losses,
    timestep_probabilities,
    timesteps_at,
    training_target,
)
from ldm.train.loss_recipe import LossSection
from ldm.train.task import Batch

KEPT = 10  # losses of each timestep
ANY = 0.001  # share of uniform draws beside them, so that no timestep is forgotten; as in improved-diffusion


class Objective(nn.Module):
    """What the options of a loss ask of a network's output, from the draw of timesteps on."""

    def __init__(self, schedule: Schedule, options: LossSection) -> None:
        super().__init__()
        self.options = options
        self.levels = Levels(schedule, options)
        self.probabilities = timestep_probabilities(options, len(schedule.alphas_cumprod))
        self.bound = None if options.variance == "none" else BoundTerms(schedule)
        by_losses = options.timestep_sampling == "loss_second_moment"
        self.history = LossHistory(self.probabilities) if by_losses else None

    def draw(self, count: int, rng: torch.Generator) -> Batch:
        """What decides the timesteps of a batch, on the CPU: these or, where they depend on losses, `u`.

        A batch may be made ahead, when the losses are not known yet: see `timesteps`.
        """
        if self.history is not None:
            return {"u": torch.rand(count, generator=rng)}
        return {"t": draw_timesteps(self.probabilities, count, rng)}

    def timesteps(self, batch: Batch) -> Tensor:
        """The timesteps of a batch, int64 [B]."""
        return batch["t"] if self.history is None else timesteps_at(self.history.probabilities(), batch["u"])

    def forward(self, output: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each picture [B], and what to log: `vlb`, an estimate of L_vlb in bits/dim.

        Args:
            output: [B, c, H, W], or [B, 2 c, H, W] of a network that says its variance.
            batch: with x0 and noise, [B, c, H, W], and t.
        """
        t = batch["t"]
        if self.bound is None:
            return self.levels.weight[t] * self.plain(output, batch, self.options), {}
        mean, v = output.float().chunk(2, dim=1)
        hybrid = self.options.variance == "hybrid"
        terms = self.bound(self._x0(mean.detach() if hybrid else mean, batch), v, batch["x0"], t)
        p = self.probabilities if self.history is None else self.history.probabilities()
        vlb = terms / p.to(terms)[t]
        if self.history is not None and self.training:
            self.history.add(t, terms.detach())
        said = {"vlb": vlb.detach().mean()}
        if not hybrid:
            return vlb, said
        simple = self.levels.weight[t] * self.plain(output, batch, self.options)
        return simple + self.options.variance_weight * vlb, said

    def plain(self, output: Tensor, batch: Batch, options: LossSection = PLAIN_LOSS) -> Tensor:
        """The loss of each picture's mean, whatever its noise level: [B]. Shapes as in `forward`.

        Where the batch has a `weight` [B, H, W], each place counts so much.
        """
        x0, noise, t = batch["x0"], batch["noise"], batch["t"]
        losses = pixel_losses(output[:, : x0.shape[1]], training_target(x0, noise, t, self.levels), options)
        return (losses * batch["weight"] if "weight" in batch else losses).mean((1, 2))

    def _x0(self, mean: Tensor, batch: Batch) -> Tensor:
        """The guess of x_0 that the mean's channels speak of."""
        sigma = self.levels.sigma[batch["t"]][:, None, None, None]
        return self.levels.prediction.x0(mean, batch["x0"] + sigma * batch["noise"], sigma)


class BoundTerms(nn.Module):
    """L_t at every timestep of a schedule: tables [T], fp32, which go where their task goes.

    share: what x_0 counts in the mean of ``q(x_{t-1} | x_t, x_0)``; that of x_t is the same in p, which does
    not matter. lower, upper: the logs of beta-tilde and beta. At t = 0, the decoder, both are beta: its
    variance is fixed, as in `ldm.diffusion.bound`.
    """

    share: Tensor
    lower: Tensor
    upper: Tensor

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        a_t = schedule.alphas_cumprod
        a_s = torch.cat([torch.ones_like(a_t[:1]), a_t[:-1]])
        lower, upper = log_variances(a_t, a_s)
        lower[0] = upper[0]
        tables = {"share": a_s.sqrt() * (1 - a_t / a_s) / (1 - a_t), "lower": lower, "upper": upper}
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)  # no part of a run's state

    def forward(self, guess: Tensor, v: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """L_t in bits/dim, [B].

        Args:
            guess: of x_0; v: what the network says of the variance; x0: the truth, each [B, C, H, W].
            t: timesteps, int64 [B].
        """
        tables = (self.share, self.lower, self.upper)
        share, lower, upper = (table[t][:, None, None, None] for table in tables)
        p = Gaussian(share * guess, interpolated_log_variance(v, lower, upper))
        step, decoder = Gaussian(share * x0, lower).kl(p), -p.log_prob(x0)
        nats = torch.where(t[:, None, None, None] == 0, decoder, step).sum((1, 2, 3))
        return bits_per_dim(nats, x0[0].numel())


class LossHistory(nn.Module):
    """The last 10 losses of each timestep, and how often to draw it: buffers, and part of a run's state.

    ``p(t)`` in proportion to the root of the mean square of its losses: then the estimate of their sum varies
    least (equation 18). Until each timestep has ten, all are drawn alike. Several processes go by the losses
    of the first, which torch's DistributedDataParallel gives to the others before each step.
    """

    losses: Tensor  # fp32 [T, KEPT]
    count: Tensor  # int64 [T]
    trained: Tensor  # bool [T]

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(len(probabilities), KEPT))
        self.register_buffer("count", torch.zeros(len(probabilities), dtype=torch.int64))
        self.register_buffer("trained", probabilities > 0, persistent=False)

    def probabilities(self) -> Tensor:
        """Of each timestep, fp32 [T]; they sum to 1."""
        uniform = self.trained / self.trained.sum()
        rms = self.losses.square().mean(1).sqrt() * self.trained
        known = (self.count >= KEPT) | ~self.trained
        by_losses = (1 - ANY) * rms / rms.sum().clamp(min=torch.finfo(rms.dtype).tiny) + ANY * uniform
        return torch.where(known.all(), by_losses, uniform)

    @torch.no_grad()
    def add(self, t: Tensor, losses: Tensor) -> None:
        """Take in losses [B] of timesteps [B], each in the place of the oldest of its timestep."""
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self.losses[step, int(self.count[step]) % KEPT] = loss
                self.count[step] += 1
