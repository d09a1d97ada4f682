"""What the scorer is trained to see through."""

import pytest
import torch

from ldm.postcards.scoring.soften import blur, melt, soften


def pictures(n=8, size=64):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_blur_of_a_point_has_the_width_asked_for():
    x = torch.zeros(1, 1, 65, 65)
    x[..., 32, 32] = 1
    y = blur(x, 3.0)[0, 0]
    places = torch.arange(65.0) - 32
    assert y.sum() == pytest.approx(1, abs=1e-5)
    assert (y.sum(0) * places**2).sum() == pytest.approx(9, rel=1e-3)
    assert (y.sum(1) * places**2).sum() == pytest.approx(9, rel=1e-3)


def test_blur_keeps_a_flat_picture_to_its_edges():
    torch.testing.assert_close(blur(torch.full((1, 3, 32, 32), 0.7), 4.0), torch.full((1, 3, 32, 32), 0.7))


def test_soften_depends_on_the_generator_alone_and_leaves_its_input():
    x = pictures()
    before = x.clone()
    a, b = (soften(x, torch.Generator().manual_seed(5)) for _ in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert a.abs().max() <= 1
    assert (a != soften(x, torch.Generator().manual_seed(6))).any()


def test_soften_leaves_some_pictures_crisp_and_changes_most():
    x = pictures(64, 32)
    same = (soften(x, torch.Generator().manual_seed(0)) == x).flatten(1).all(1).sum()
    assert 2 <= same <= 20


def test_melt_hides_a_pattern_in_the_object_and_keeps_its_colour_and_what_is_far():
    size = 64
    x = torch.full((1, 3, size, size), -0.5)
    mask = torch.zeros(1, 1, size, size)
    mask[..., 36:60, 20:44] = 1
    stripes = (torch.arange(size) // 2 % 2 * 2.0 - 1).expand(size, size)
    x = torch.where(mask.bool(), torch.stack([stripes, stripes, torch.ones(size, size)])[None], x)
    y = melt(x, mask, torch.Generator().manual_seed(0))
    inside = y[0, :, 42:54, 26:38]
    assert inside[0].std() < 0.1 < x[0, 0, 42:54, 26:38].std()  # no stripes left
    assert inside[2].mean() > 0.5  # still a blue thing
    torch.testing.assert_close(y[..., :8, :], x[..., :8, :], rtol=0, atol=0.02)
