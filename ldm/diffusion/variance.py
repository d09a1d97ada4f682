"""Learned variance: a network of twice the latents' channels, first those of the mean, then the variance's.

Nichol and Dhariwal 2021, "Improved DDPM", section 3.1; diffusers' ``variance_type: learned_range``. Solvers
find it in `Denoised.log_variance`: `ddpm` draws with it, all others need x0 only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ldm.diffusion.forward import interpolated_log_variance, sigma_log_variances
from ldm.diffusion.guidance import Guidance, Predict, ToX0
from ldm.diffusion.solvers import Denoise, Denoised


@dataclass(frozen=True)
class LearnedVariance:
    """`base`, of a network that has learned its variance: it sees the mean's channels, as of any other.

    The variance is that of the branch "cond", as in diffusers' IFPipeline: guidance moves the mean alone.
    From a guidance that never asks for that branch there is none.
    """

    base: Guidance

    def __call__(self, predict: Predict, to_x0: ToX0) -> Denoise:
        said: dict[str, Tensor] = {}

        def means(x: Tensor, sigma: Tensor, branches: tuple[str, ...]) -> dict[str, Tensor]:
            found = {}
            for name, output in predict(x, sigma, branches).items():
                found[name], said[name] = output.chunk(2, dim=1)
            return found

        guided = self.base(means, to_x0)

        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            said.clear()
            d = guided(x, sigma)
            v = said.get("cond")
            if v is None:
                return d

            def log_variance(sigma_next: Tensor) -> Tensor:
                return interpolated_log_variance(v, *sigma_log_variances(sigma, sigma_next))

            return replace(d, log_variance=log_variance)

        return denoise
