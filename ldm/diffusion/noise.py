"""The only source of randomness: one seeded generator per image.

Noise is drawn on the CPU in fp32 whatever the device and dtype of the run, so that a seed means the same
everywhere, and image by image, so that image k of a batch equals the image drawn alone with its seed.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.philox import Philox
from ldm.errors import UserError

SEED_LIMIT = 2**63


def torch_seed(seed: int) -> int:
    """What torch's generator on the CPU is seeded with: the seed itself up to 32 bits, else a hash of it.

    The generator takes in the lower 32 bits and drops the others: 2**32 + 1 would draw what 1 draws.
    """
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")


Generator = torch.Generator | Philox
Shape = tuple[int, int, int]  # of one image's latents [C, H, W]


@dataclass(frozen=True)
class Seed:
    """An image's seed, and what AUTOMATIC1111's extra settings make of it.

    gpu: noise as CUDA draws it (`Philox`). variation, share: another seed, whose noise the first noise is
    turned towards (`slerp`), and a Brownian path too, without which its samplers would hardly heed it; what
    ancestral samplers add stays. drawn_at: (height, width) of the latents whose noise is centred in the first
    ("seed resize"). delta: what is added to the seed for all noise after the first ("ENSD"); 0: it goes on.
    """

    seed: int
    gpu: bool = False
    variation: int = 0
    share: float = 0.0
    drawn_at: tuple[int, int] | None = None
    delta: int = 0

    def generator(self, seed: int) -> Generator:
        return Philox(seed) if self.gpu else torch.Generator("cpu").manual_seed(torch_seed(seed))

    def first(self, shape: Shape, generator: Generator, other: Generator) -> Tensor:
        """Unit noise [1, C, H, W] to begin with; `generator` is the image's own, `other` the variation's."""
        size = self.drawn_at or shape[1:]
        small = (shape[0], *size)
        own = generator if small == shape else self.generator(self.seed)
        noise = _randn(own, small)
        if self.share:
            noise = slerp(noise, _randn(other, small), self.share)
        return noise if small == shape else _centred(noise, _randn(generator, shape))


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a at 0 to b at 1, [1, C, H, W], along the arc between them: what lies between is unit noise too.

    ``(sin((1 - s) w) a + sin(s w) b) / sin w``, w the angle of a and b; Shoemake 1985. As AUTOMATIC1111 has
    it: an angle for each column [C, :, W] of latents. A straight line where a column's are parallel.
    """
    cos = (a / a.norm(dim=2, keepdim=True) * (b / b.norm(dim=2, keepdim=True))).sum(2, keepdim=True)
    angle = cos.clamp(-1, 1).acos()
    arc = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-4, arc, a.lerp(b, share))


def _centred(inner: Tensor, outer: Tensor) -> Tensor:
    """`outer` with `inner` [1, C, h, w] in its middle, as much of it as there is room for."""
    out = outer.clone()
    places = []
    for axis in (2, 3):
        gap = (outer.shape[axis] - inner.shape[axis]) // 2
        length = inner.shape[axis] + min(0, 2 * gap)
        places.append((slice(max(0, gap), max(0, gap) + length), slice(max(0, -gap), max(0, -gap) + length)))
    (rows, from_rows), (columns, from_columns) = places
    out[:, :, rows, columns] = inner[:, :, from_rows, from_columns]
    return out


def _randn(generator: Generator, shape: Shape) -> Tensor:
    """Unit noise [1, C, H, W]."""
    if isinstance(generator, Philox):
        return generator.randn((1, *shape))
    return torch.randn((1, *shape), generator=generator)


def _sent(noise: Tensor, device: torch.device) -> Tensor:
    """Noise of the CPU on a device.

    A card takes it when it comes to that, and the host goes on, as it could not from memory that may move.
    """
    if device.type != "cuda":
        return noise.to(device)
    return noise.pin_memory().to(device, non_blocking=True)


class Noise:
    """Independent unit noise, image by image.

    One image's draws equal those of diffusers with ``generator=torch.Generator().manual_seed(seed)``, and a
    batch's those of diffusers with the list of such generators, for seeds of up to 32 bits (`torch_seed`).
    """

    def __init__(self, seeds: Sequence[int | Seed | torch.Generator]) -> None:
        self.generators: list[Any] = []  # torch's, or Philox
        self._seeds = [each if isinstance(each, Seed) else None for each in seeds]  # that begin otherwise
        # The generators of their variations' seeds.
        self._others: list[Any] = [each and each.generator(each.variation) for each in self._seeds]
        for each in seeds:
            seed = each.seed if isinstance(each, Seed) else each
            if isinstance(seed, int) and not 0 <= seed < SEED_LIMIT:
                raise UserError(f"seed {seed} is out of range: give a number from 0 to {SEED_LIMIT - 1}")
            if isinstance(each, Seed):
                self.generators.append(each.generator(each.seed))
            elif isinstance(each, int):
                of = each if each < 2**32 else torch_seed(each)
                self.generators.append(torch.Generator("cpu").manual_seed(of))
            elif each.device.type != "cpu":
                raise UserError(f"generator is on {each.device}: noise is drawn on the CPU, give one there")
            else:
                self.generators.append(each)

    def first(self, shape: Shape) -> Tensor:
        """Unit noise [B, C, H, W], fp32 on the CPU, to start from; `shape` is one image's."""
        drawn = []
        for k, (seed, generator) in enumerate(zip(self._seeds, self.generators, strict=True)):
            drawn.append(
                _randn(generator, shape) if seed is None else seed.first(shape, generator, self._others[k])
            )
            if seed is not None and seed.delta:
                self.generators[k] = seed.generator(seed.seed + seed.delta)
        return torch.cat(drawn)

    def initial(self, shape: Shape) -> Tensor:
        """Unit noise [B, C, H, W], fp32 on the CPU, of each image's generator; `shape` is one image's."""
        return torch.cat([_randn(each, shape) for each in self.generators])

    def __call__(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Unit noise of `like`'s shape, device and dtype for the step from `sigma` to `sigma_next`.

        Raises:
            UserError: if `like` holds another number of images than there are seeds.
        """
        if like.shape[0] != len(self.generators):
            raise UserError(
                f"{like.shape[0]} images but {len(self.generators)} seeds: give one seed per image"
            )
        return _sent(self.draw(like, sigma, sigma_next).to(like.dtype), like.device)

    def draw(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The noise itself, fp32 on the CPU; here it does not depend on the noise levels."""
        _, channels, height, width = like.shape
        return self.initial((channels, height, width))


class BrownianPaths:
    """Brownian motions on [0, 1], one per image, by their increments: `paths(low, high)` is [B, C, H, W].

    The numbers are those of torchsde's BrownianInterval(tol=1e-6, pool_size=24, halfway_tree=True), to the
    last bit: an increment over a dyadic interval is drawn from its parent's (a Brownian bridge), with a seed
    that follows from the path's entropy and the place in the tree. There each image walks a tree of its own
    in Python; here one tree serves all of a batch.
    """

    def __init__(self, entropies: Sequence[int], shape: Shape) -> None:
        self.entropies, self.shape = tuple(entropies), shape
        self._whole = self._normal((), 3)
        self._kept = OrderedDict[tuple[int, int], Tensor]()  # the last increments, by place and depth

    def __call__(self, low: float, high: float) -> Tensor:
        """What the paths gain between two times."""
        low, high = round(low, DIGITS), round(high, DIGITS)
        if low == high:
            return torch.zeros_like(self._whole)
        gained, *others = self._between(low, high, 0.0, 1.0, self._whole, (0, 0))
        for each in others:
            gained = gained + each
        return gained

    def _between(
        self, low: float, high: float, start: float, end: float, own: Tensor, node: tuple[int, int]
    ) -> Iterator[Tensor]:
        """The increments over the dyadic intervals that make up [low, high] within that of `node`, in order;
        its own is from `start` to `end`.
        """
        if (low, high) == (start, end):
            yield own
            return
        middle = round(0.5 * (end + start), DIGITS)
        left = self._left(start, middle, end, own, node)
        place, depth = node
        if low < middle:
            yield from self._between(low, min(high, middle), start, middle, left, (2 * place, depth + 1))
        if high > middle:
            right = (2 * place + 1, depth + 1)
            yield from self._between(max(low, middle), high, middle, end, own - left, right)

    def _left(self, start: float, middle: float, end: float, own: Tensor, node: tuple[int, int]) -> Tensor:
        """Over the left half of an interval: ``own (m - s)/(e - s) + sqrt((m - s)(e - m)/(e - s)) noise``."""
        if node in self._kept:
            self._kept.move_to_end(node)
            return self._kept[node]
        inverse = 1 / (end - start)
        spread = math.sqrt((middle - start) * (end - middle) * inverse)
        left = (middle - start) * own * inverse + spread * self._normal(node, 4)
        self._kept[node] = left
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return left

    def _normal(self, node: tuple[int, ...], words: int) -> Tensor:
        """Unit noise of a place in the tree, [B, C, H, W]: `words` are how many seeds it has there."""
        drawn, generator = torch.empty(len(self.entropies), *self.shape), torch.Generator("cpu")
        for k, entropy in enumerate(self.entropies):
            sequence = np.random.SeedSequence(entropy=entropy, spawn_key=node, pool_size=POOL)
            generator.manual_seed(int(sequence.generate_state(words)[0]))
            torch.randn(self.shape, generator=generator, out=drawn[k])
        return drawn


DIGITS = 6  # to which times are rounded
POOL = 24  # words of entropy of a seed
KEPT = 48  # increments that are kept: two paths down the tree


class BrownianNoise(Noise):
    """Increments of one Brownian path per image: more steps refine the same picture.

    ``(W(u') - W(u)) / sqrt(|u' - u|)`` with ``u = sigma / (1 + sigma)``, which puts every noise level into
    [0, 1], so that the path depends on the seed alone and not on the grid. Li et al. 2020, "Scalable
    Gradients for Stochastic Differential Equations", section 4.
    """

    def __init__(self, seeds: Sequence[int | Seed | torch.Generator]) -> None:
        super().__init__(seeds)
        self._paths: Callable[[float, float], Tensor] | None = None
        self._varied: dict[int, Callable[[float, float], Tensor]] = {}  # of images that are turned

    def draw(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        # On the first call, since an image's initial noise comes first out of its generator.
        if self._paths is None:
            _, *sides = like.shape
            shape = (sides[0], sides[1], sides[2])
            self._paths = BrownianPaths([entropy_of(each) for each in self.generators], shape)
            self._varied = {
                k: BrownianPaths([entropy_of(other)], shape)
                for k, (seed, other) in enumerate(zip(self._seeds, self._others, strict=True))
                if seed and other and seed.share
            }
        low, high = sorted(level / (1 + level) for level in (sigma, sigma_next))
        increments = self._paths(low, high)
        for k, varied in self._varied.items():  # an arc of a quarter turn: the paths are independent
            seed = self._seeds[k]
            angle = (seed.share if seed else 0.0) * math.pi / 2
            turned = math.cos(angle) * increments[k] + math.sin(angle) * varied(low, high)[0]
            increments = increments.clone()
            increments[k] = turned
        return increments / math.sqrt(high - low)


def entropy_of(generator: Generator) -> int:
    """What a path of an image's generator comes of: the next number out of it."""
    if isinstance(generator, Philox):  # k-diffusion's path is drawn on the CPU, whatever drew the rest
        generator = torch.Generator("cpu").manual_seed(torch_seed(generator.seed))
    return int(torch.randint(SEED_LIMIT - 1, (), generator=generator))
