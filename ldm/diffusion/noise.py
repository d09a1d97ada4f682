"""The only source of randomness: one seeded generator per image.

Noise is drawn on the CPU in fp32 whatever the device and dtype of the run, so that a seed means the same
everywhere, and image by image, so that image k of a batch equals the image drawn alone with its seed.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

SEED_LIMIT = 2**63


def torch_seed(seed: int) -> int:
    """What torch's generator on the CPU is seeded with: the seed itself up to 32 bits, else a hash of it.

    The generator takes in the lower 32 bits and drops the others: 2**32 + 1 would draw what 1 draws.
    """
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")


class Noise:
    """Independent unit noise, image by image.

    One image's draws equal those of diffusers with ``generator=torch.Generator().manual_seed(seed)``, and a
    batch's those of diffusers with the list of such generators, for seeds of up to 32 bits (`torch_seed`).
    """

    def __init__(self, seeds: Sequence[int | torch.Generator]) -> None:
        self.generators = []
        for seed in seeds:
            if not isinstance(seed, torch.Generator):
                if not 0 <= seed < SEED_LIMIT:
                    raise UserError(f"seed {seed} is out of range: give a number from 0 to {SEED_LIMIT - 1}")
                seed = torch.Generator("cpu").manual_seed(seed if seed < 2**32 else torch_seed(seed))
            if seed.device.type != "cpu":
                raise UserError(f"generator is on {seed.device}: noise is drawn on the CPU, give one there")
            self.generators.append(seed)

    def initial(self, shape: tuple[int, int, int]) -> Tensor:
        """Unit noise [B, C, H, W], fp32 on the CPU, to start from; `shape` is one image's [C, H, W]."""
        return torch.cat([torch.randn((1, *shape), generator=each) for each in self.generators])

    def __call__(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Unit noise of `like`'s shape, device and dtype for the step from `sigma` to `sigma_next`.

        Raises:
            UserError: if `like` holds another number of images than there are seeds.
        """
        if like.shape[0] != len(self.generators):
            raise UserError(
                f"{like.shape[0]} images but {len(self.generators)} seeds: give one seed per image"
            )
        return self.draw(like, sigma, sigma_next).to(like)

    def draw(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The noise itself, fp32 on the CPU; here it does not depend on the noise levels."""
        _, channels, height, width = like.shape
        return self.initial((channels, height, width))


class BrownianNoise(Noise):
    """Increments of one Brownian path per image: more steps refine the same picture.

    ``(W(u') - W(u)) / sqrt(|u' - u|)`` with ``u = sigma / (1 + sigma)``, which puts every noise level into
    [0, 1], so that the path depends on the seed alone and not on the grid. Li et al. 2020, "Scalable
    Gradients for Stochastic Differential Equations", section 4; torchsde's BrownianInterval.
    """

    def __init__(self, seeds: Sequence[int | torch.Generator]) -> None:
        super().__init__(seeds)
        self._paths: list[Any] = []

    def draw(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        # On the first call, since an image's initial noise comes first out of its generator.
        if not self._paths:
            self._paths = [self._path(each, tuple(like.shape[1:])) for each in self.generators]
        low, high = sorted(level / (1 + level) for level in (sigma, sigma_next))
        increments: list[Tensor] = [path(low, high) for path in self._paths]
        return torch.stack(increments) / math.sqrt(high - low)

    @staticmethod
    def _path(generator: torch.Generator, shape: tuple[int, ...]) -> Any:
        import torchsde

        entropy = int(torch.randint(SEED_LIMIT - 1, (), generator=generator))
        return torchsde.BrownianInterval(
            0.0,
            1.0,
            size=shape,
            dtype=torch.float32,
            entropy=entropy,
            tol=1e-6,
            pool_size=24,
            halfway_tree=True,
        )
