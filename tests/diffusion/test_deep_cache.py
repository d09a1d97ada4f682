"""Which calls of which solver are whole, and whose features the others go on from."""

import torch

from ldm.diffusion.deep_cache import DeepCache
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.solvers import Denoised

LEVELS = torch.tensor([8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)


def calls(sampler, interval, **options):
    """(level, level at which the features that it uses were computed) of each call."""
    cache, seen = DeepCache(interval, LEVELS), []

    def denoise(x, sigma):
        told = {"cond": LEVELS}
        deep = cache.kept(told, sigma)
        if deep is None:
            deep = sigma.expand(1, 1).clone()
            cache.keep(told, sigma, deep)
        seen.append((round(float(sigma), 6), round(float(deep), 6)))
        return Denoised(0.9 * x)

    found = SAMPLERS[sampler]
    for _ in found.solver(denoise, torch.ones(1, 1, 2, 2), LEVELS, found.noise([0]), **options):
        pass
    return seen


def test_of_n_steps_one_is_whole():
    assert calls("euler", 1) == [(level, level) for level in LEVELS[:-1].tolist()]
    assert calls("euler", 3) == [(8, 8), (6, 8), (4, 8), (3, 3), (2, 3), (1, 3), (0.5, 0.5)]
    assert calls("dpmpp_2m", 2) == [(8, 8), (6, 8), (4, 4), (3, 4), (2, 2), (1, 2), (0.5, 0.5)]


def test_both_calls_at_one_level_are_of_one_kind():
    """Heun calls at each level but the first twice: at the end of a step, and at the next one's beginning."""
    heun = calls("heun", 2)
    assert len(heun) == 13
    assert set(heun) == {(8, 8), (6, 8), (4, 4), (3, 4), (2, 2), (1, 2), (0.5, 0.5)}


def test_a_call_between_levels_is_like_that_of_its_step():
    between = calls("dpm2", 2)
    assert len(between) == 13
    for level, made in between:
        step = int((level <= LEVELS).sum()) - 1
        if step % 2 == 0:
            assert made == level
        else:  # the last that were computed: in the middle of the step before
            assert LEVELS[step] < made < LEVELS[step - 1]


def test_nothing_is_used_above_the_level_where_it_was_computed():
    cache, told = DeepCache(5, LEVELS), {"cond": LEVELS}
    cache.keep(told, LEVELS[2], torch.ones(1, 1))
    assert cache.kept(told, LEVELS[3]) is not None
    assert cache.kept(told, LEVELS[2]) is None  # it would be computed again
    assert cache.kept(told, LEVELS[1]) is None
    for level, made in [*calls("euler", 4, s_churn=5.0), *calls("restart", 4)]:
        assert level <= made


def test_a_branch_that_is_new_and_a_text_that_is_another_make_the_call_whole():
    cache, one, other = DeepCache(4, LEVELS), object(), object()
    cache.keep({"cond": one}, LEVELS[0], torch.zeros(2, 1))
    assert cache.kept({"uncond": other, "cond": one}, LEVELS[1]) is None
    cache.keep({"uncond": other, "cond": one}, LEVELS[1], torch.arange(4.0)[:, None])
    assert cache.kept({"uncond": other, "cond": one}, LEVELS[2]).tolist() == [[0], [1], [2], [3]]
    assert cache.kept({"cond": one}, LEVELS[2]).tolist() == [[2], [3]]  # a branch has its own
    assert cache.kept({"cond": other}, LEVELS[2]) is None
