"""One generator per image: seeds mean the same in any batch, as in diffusers."""

import itertools
import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ldm.diffusion.noise import BrownianNoise, BrownianPaths, Noise
from ldm.errors import UserError

LIKE = torch.zeros(3, 4, 8, 8)


@pytest.mark.parametrize("kind", [Noise, BrownianNoise])
def test_initial_noise_is_that_of_diffusers(kind):
    want = randn_tensor((3, 4, 8, 8), generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    assert torch.equal(kind([5, 6, 7]).initial((4, 8, 8)), want)
    alone = randn_tensor((1, 4, 8, 8), generator=torch.Generator().manual_seed(6))
    assert torch.equal(kind([torch.Generator().manual_seed(6)]).initial((4, 8, 8)), alone)


def test_later_draws_are_those_of_diffusers():
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    noise = Noise([5, 6, 7])
    for _ in range(3):
        assert torch.equal(noise(LIKE, 2.0, 1.0), randn_tensor(LIKE.shape, generator=generators))


@pytest.mark.parametrize("kind", [Noise, BrownianNoise])
def test_image_does_not_depend_on_the_batch(kind):
    together, alone = kind([1, 2, 3]), kind([2])
    together.initial((4, 8, 8))
    alone.initial((4, 8, 8))
    for sigma, sigma_next in ((9.0, 4.0), (4.0, 1.0)):
        many, one = together(LIKE, sigma, sigma_next), alone(LIKE[:1], sigma, sigma_next)
        assert torch.equal(many[1:2], one)
        assert not torch.equal(many[0], many[1])


@pytest.mark.parametrize("kind", [Noise, BrownianNoise])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_drawn_in_fp32_whatever_the_dtype(kind, dtype):
    want = kind([1, 2, 3])(LIKE, 4.0, 1.0)
    got = kind([1, 2, 3])(LIKE.to(dtype), 4.0, 1.0)
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))


def test_brownian_noise_is_unit_and_independent():
    like, noise = torch.zeros(1, 1, 256, 256), BrownianNoise([0])
    levels = [4096.0, 90.0, 14.0, 3.0, 0.5, 0.03]
    draws = [noise(like, *pair).flatten().double() for pair in itertools.pairwise(levels)]
    gram = torch.stack(draws) @ torch.stack(draws).T / like.numel()
    assert torch.allclose(gram, torch.eye(len(draws), dtype=torch.float64), atol=5 / 256)
    assert all(abs(float(draw.mean())) < 5 / 256 for draw in draws)


def test_brownian_steps_add_up():
    """Two short steps spend the noise of the long one: more steps refine the same picture."""

    def u(sigma):
        return sigma / (1 + sigma)

    noise = BrownianNoise([0, 1, 2])
    long = noise(LIKE, 6.0, 1.0) * math.sqrt(u(6.0) - u(1.0))
    short = [noise(LIKE, a, b) * math.sqrt(u(a) - u(b)) for a, b in ((6.0, 2.5), (2.5, 1.0))]
    assert torch.allclose(long, short[0] + short[1], atol=1e-4)
    # and the path is the seed's alone, whatever was asked before
    assert torch.allclose(
        BrownianNoise([0, 1, 2])(LIKE, 2.5, 1.0) * math.sqrt(u(2.5) - u(1.0)), short[1], atol=1e-4
    )


def test_wrong_seeds():
    with pytest.raises(UserError, match="3 images but 2 seeds"):
        Noise([1, 2])(LIKE, 2.0, 1.0)
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match="out of range"):
            Noise([seed])


BIG = (2**32 + 1, 2**33 + 1, 2**40 + 1, 2**63 - 1, 2**62)


@pytest.mark.parametrize("kind", [Noise, BrownianNoise])
def test_every_bit_of_a_seed_counts(kind):
    """torch's own generator takes in the lower 32 bits: with it these would be 1, 1, 1, 2**32 - 1 and 0."""
    seeds = (1, 0, 2**32 - 1, *BIG)
    starts = [kind([seed]).initial((1, 4, 4)) for seed in seeds]
    later = [kind([seed])(torch.zeros(1, 1, 4, 4), 2.0, 1.0) for seed in seeds]
    for draws in (starts, later):
        assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(seeds)
    together = kind(BIG).initial((1, 4, 4))
    assert torch.equal(together, torch.cat(starts[3:]))  # and each is the same in a batch


def test_seeds_of_32_bits_are_torchs_own():
    for seed in (0, 1, 2**31, 2**32 - 1):
        want = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(Noise([seed]).initial((4, 8, 8)), want)


def test_brownian_paths_are_those_of_torchsde_to_the_last_bit():
    import random

    import torchsde

    numbers = random.Random(4)
    entropies = [numbers.randrange(2**63 - 1) for _ in range(3)]
    how = {"size": (2, 3, 4), "dtype": torch.float32, "tol": 1e-6, "pool_size": 24, "halfway_tree": True}
    theirs = [torchsde.BrownianInterval(0.0, 1.0, entropy=each, **how) for each in entropies]
    ours = BrownianPaths(entropies, (2, 3, 4))
    asked = [sorted((numbers.random(), numbers.random())) for _ in range(20)]
    asked += [(0.0, 1.0), (0.5, 1.0), (0.25, 0.5), (0.1, 0.100001), (0.3, 0.3)]
    numbers.shuffle(asked)
    for low, high in asked:
        assert torch.equal(ours(low, high), torch.stack([path(low, high) for path in theirs]))


def test_what_was_asked_before_changes_no_increment(monkeypatch):
    monkeypatch.setattr("ldm.diffusion.noise.KEPT", 3)
    few = BrownianPaths([5], (1, 2, 2))
    asked = [(0.1, 0.4), (0.4, 0.77), (0.05, 0.9), (0.1, 0.4)]
    for low, high in asked:
        assert torch.equal(few(low, high), BrownianPaths([5], (1, 2, 2))(low, high))
