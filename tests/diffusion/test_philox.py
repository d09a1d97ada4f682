"""CUDA's noise on any machine."""

import pytest
import torch

from ldm.diffusion.noise import BrownianNoise, Noise, Seed, slerp
from ldm.diffusion.philox import Philox

# torch.manual_seed(0); torch.randn(3, 4, device="cuda"), as its users have published it.
OF_SEED_0 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def test_known_values():
    generator = Philox(0)
    torch.testing.assert_close(generator.randn((3, 4)), torch.tensor(OF_SEED_0), rtol=1e-5, atol=1e-6)
    assert not torch.equal(generator.randn((3, 4)), Philox(0).randn((3, 4)))


def test_words_of_the_generator_are_those_of_its_paper():
    """Random123's kat_vectors: philox4x32 10, all zeros and all ones."""
    from ldm.diffusion import philox

    zeros = philox._philox(0, 1, 0)
    assert [int(word[0]) for word in zeros] == [0x6627E8D5, 0xE169C58D]


def test_both_halves_of_a_seed_count():
    noise = [Philox(seed).randn((64,)) for seed in (7, 7 + 2**32, 7 + 2**40)]
    assert len({tuple(each.tolist()) for each in noise}) == 3


def test_it_is_unit_noise():
    noise = Philox(3).randn((4, 128, 128))
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01


def test_a_batch_draws_what_each_draws_alone():
    kinds = [Seed(4, gpu=True, variation=9, share=0.3), Seed(5, delta=31337), Seed(6, drawn_at=(4, 12)), 7]

    def drawn(seeds):
        noise = Noise(seeds)
        return [noise.first((4, 8, 8)), noise.initial((4, 8, 8)), noise.initial((4, 8, 8))]

    together = drawn(kinds)
    for k, kind in enumerate(kinds):
        for own, all_of_them in zip(drawn([kind]), together, strict=True):
            assert torch.equal(own[0], all_of_them[k])


def test_plain_seeds_draw_what_they_drew():
    assert torch.equal(Noise([Seed(5)]).first((4, 8, 8)), Noise([5]).initial((4, 8, 8)))


def test_a_variation_goes_from_one_noise_to_the_other_along_the_arc():
    a, b = Noise([3]).initial((4, 64, 64)), Noise([8]).initial((4, 64, 64))
    assert torch.equal(Noise([Seed(3, variation=8, share=0.0)]).first((4, 64, 64)), a)
    torch.testing.assert_close(Noise([Seed(3, variation=8, share=1.0)]).first((4, 64, 64)), b)
    half = Noise([Seed(3, variation=8, share=0.5)]).first((4, 64, 64))
    assert abs(float(half.std()) - 1) < 0.02 < abs(float(((a + b) / 2).std()) - 1)
    torch.testing.assert_close(slerp(a, a, 0.4), a)


def test_an_arc_is_that_of_the_plane():
    """Two columns in a plane, a quarter turn apart: the closed form."""
    a, b = (torch.tensor([x, y]).reshape(1, 1, 2, 1) for x, y in ((1.0, 0.0), (0.0, 1.0)))
    turned = slerp(a, b, 1 / 3).flatten()
    torch.testing.assert_close(turned, torch.tensor([3**0.5 / 2, 0.5]))


@pytest.mark.parametrize(("size", "inner"), [((4, 4), (slice(2, 6), slice(2, 6))), ((16, 8), None)])
def test_a_resized_seed_has_the_other_sizes_noise_in_its_middle(size, inner):
    small, large = Noise([3]).initial((4, *size)), Noise([3]).initial((4, 8, 8))
    found = Noise([Seed(3, drawn_at=size)]).first((4, 8, 8))
    if inner is None:  # taller: its middle rows fill all
        assert torch.equal(found, small[:, :, 4:12])
        return
    assert torch.equal(found[:, :, *inner], small)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[inner] = False
    assert torch.equal(found[..., outside], large[..., outside])


def test_a_delta_changes_all_noise_but_the_first():
    noise = Noise([Seed(3, delta=100)])
    assert torch.equal(noise.first((4, 8, 8)), Noise([3]).initial((4, 8, 8)))
    assert torch.equal(noise.initial((4, 8, 8)), Noise([103]).initial((4, 8, 8)))


def test_a_brownian_path_is_of_the_seed():
    like = torch.zeros(1, 4, 8, 8)
    paths = [BrownianNoise([Seed(seed, gpu=True)])(like, 2.0, 1.0) for seed in (3, 3, 4)]
    assert torch.equal(paths[0], paths[1])
    assert not torch.equal(paths[0], paths[2])


def test_a_varied_path_goes_from_one_seeds_to_the_others():
    def paths(seed):
        noise = BrownianNoise([seed])
        noise.first((4, 32, 32))
        return noise(torch.zeros(1, 4, 32, 32), 2.0, 1.0)

    own, other = paths(3), paths(8)
    torch.testing.assert_close(paths(Seed(3, variation=8, share=0.0)), own)
    torch.testing.assert_close(paths(Seed(3, variation=8, share=1.0)), other)
    half = paths(Seed(3, variation=8, share=0.5))
    torch.testing.assert_close(half, (own + other) / 2**0.5)
    assert abs(float(half.std()) - 1) < 0.05
