"""A Gaussian mixture with the exact denoiser: what theory is held against. All in float64."""

import math

import torch

from ldm.diffusion.solvers import Denoised


class Mixture:
    """sum_k w_k N(mean_k, variance_k) over pictures [1, C, 1, D / C] of D = `means.shape[1]` numbers."""

    def __init__(self, weights, means, variances):
        self.weights, self.means, self.variances = (
            torch.tensor(values, dtype=torch.float64) for values in (weights, means, variances)
        )
        self.dims = self.means.shape[1]

    def _logits(self, x, sigma):
        """[B, K]: log of weight times density of each component of x + sigma noise."""
        variance = self.variances + sigma**2
        squared = ((x.flatten(1)[:, None] - self.means) ** 2).sum(-1)
        return (
            self.weights.log() - self.dims / 2 * torch.log(2 * math.pi * variance) - squared / (2 * variance)
        )

    def log_prob(self, x, sigma=0.0):
        return torch.logsumexp(self._logits(x, torch.as_tensor(sigma, dtype=torch.float64)), 1)

    def denoise(self, x, sigma):
        """The mean of x_0 given x."""
        share = torch.softmax(self._logits(x, sigma), 1)
        shrink = (self.variances / (self.variances + sigma**2))[None, :, None]
        each = self.means + shrink * (x.flatten(1)[:, None] - self.means)
        return Denoised((share[..., None] * each).sum(1).reshape(x.shape))

    def sample(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dims, generator=generator, dtype=torch.float64)
        drawn = self.means[which] + self.variances[which].sqrt()[:, None] * noise
        return drawn.reshape(count, 1, 1, self.dims)


LINE = Mixture([0.4, 0.6], [[-1.5], [1.0]], [0.2, 0.4])
PLANE = Mixture([0.3, 0.7], [[1.0, -1.0], [-2.0, 0.5]], [0.25, 0.5])
