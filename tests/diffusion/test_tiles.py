"""Windows over latents, and what is averaged over them, against sums by hand."""

import itertools

import pytest
import torch

from ldm.diffusion.tiles import Tiles


@pytest.mark.parametrize(("size", "overlap"), [(8, 4), (8, 0), (5, 4), (6, 3)])
@pytest.mark.parametrize("shape", [(8, 8), (9, 20), (16, 5)])
def test_windows_cover_all_and_share_what_they_should(size, overlap, shape):
    tiles = Tiles(size, overlap, 8)
    windows = tiles.windows(*shape)
    seen = torch.zeros(shape)
    for window in windows:
        part = window(seen)
        assert part.shape == (min(size, shape[0]), min(size, shape[1]))
        part.add_(1)
    assert seen.min() >= 1
    tops, lefts = ({getattr(window, name) for window in windows} for name in ("top", "left"))
    for begins in (sorted(tops), sorted(lefts)):
        assert all(b - a <= size - overlap for a, b in itertools.pairwise(begins))
    assert len(windows) == len(tops) * len(lefts) == len(set(windows))


def test_what_no_window_changes_is_whole():
    x = torch.randn(2, 4, 11, 21)
    mean = Tiles(6, 3, 8).averaged(x, lambda window: window(x).sin())
    assert torch.allclose(mean, x.sin(), atol=1e-6)


def test_windows_are_weighted_by_how_near_their_middle_is():
    """Two windows of 4 over a row of 6: at its columns 2 and 3 the weights are 2, 1 and 1, 2."""
    answers = iter((torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)))
    mean = Tiles(4, 2, 8).averaged(torch.zeros(1, 1, 1, 6), lambda window: next(answers))
    assert torch.allclose(mean.flatten(), torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))


def test_one_window_is_all():
    tiles = Tiles(8, 4, 8)
    assert tiles.is_whole(torch.zeros(1, 4, 8, 3))
    assert not tiles.is_whole(torch.zeros(1, 4, 3, 9))
