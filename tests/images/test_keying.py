"""Plain backgrounds keyed out: alpha and colours against those that a picture was laid together from."""

import numpy as np
import pytest
from PIL import Image

from ldm.images import keying
from ldm.images.keying import keyed
from ldm.postcards.sprites.atlas import load_things, pixels

WHITE, BLUE, GREEN = (1.0, 1.0, 1.0), (0.45, 0.65, 0.95), (0.3, 0.8, 0.4)
SIZE, SIDE = 160, 112


def laid(noun, behind, style="flat"):
    """A sprite on a background, in 256 levels [SIZE, SIZE, 3], and what it was made of [SIZE, SIZE, 4]."""
    thing = next(thing for thing in load_things() if thing.noun == noun)
    image = Image.fromarray(pixels(thing, style), "RGBA")
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    sprite = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)) / 255
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    truth = np.zeros((SIZE, SIZE, 4))
    truth[top : top + height, left : left + width] = sprite
    alpha = truth[..., 3:]
    return np.round((alpha * truth[..., :3] + (1 - alpha) * behind) * 255) / 255, truth


def disc(radius, behind, front=(0.8, 0.2, 0.1), size=64):
    """A disc with an edge of one pixel: the picture, and its alpha."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    alpha = (radius + 0.5 - np.hypot(y, x)).clip(0, 1)
    return alpha[..., None] * front + (1 - alpha[..., None]) * np.asarray(behind), alpha


@pytest.mark.parametrize("behind", [WHITE, BLUE])
def test_a_disc_of_one_colour_is_found_again(behind):
    picture, alpha = disc(20, behind)
    found = keyed(picture)
    # What differs from the background by less than LIKE is taken for it: of this colour a share of at most
    most = keying.LIKE / np.abs(np.subtract((0.8, 0.2, 0.1), behind)).max()
    np.testing.assert_allclose(found[..., 3], alpha, atol=most)
    seen = found[..., 3] > 0
    assert np.abs(found[seen][:, :3] - (0.8, 0.2, 0.1)).max() < 1e-6
    np.testing.assert_allclose(found[seen][:, 3], alpha[seen], atol=1e-6)


@pytest.mark.parametrize("noun", ["dog", "umbrella", "bicycle", "hedgehog"])
@pytest.mark.parametrize(("behind", "style"), [(BLUE, "flat"), (GREEN, "3d")])
def test_sprites_have_their_alpha_and_colours_back(noun, behind, style):
    picture, truth = laid(noun, behind, style)
    found = keyed(picture)
    alpha = found[..., 3]
    assert np.abs(alpha - truth[..., 3]).mean() < 0.008
    edge = (truth[..., 3] > 0.02) & (truth[..., 3] < 0.98)
    assert np.abs(alpha - truth[..., 3])[edge].mean() < 0.12
    shared = np.minimum(alpha, truth[..., 3])[..., None]
    assert (np.abs(found[..., :3] - truth[..., :3]) * shared)[edge].mean() < 0.03
    # Laid on what it was taken from it is the picture again, but where alpha became 0.
    again = alpha[..., None] * found[..., :3] + (1 - alpha[..., None]) * behind
    assert np.abs(again - picture).max() < keying.LIKE + 1e-6
    # No fringe: on black the edge is as dark as the sprite's own, and has nothing of the background.
    on_black, right = alpha[..., None] * found[..., :3], truth[..., 3:] * truth[..., :3]
    assert np.abs(on_black - right)[edge].mean() < 0.06


def test_a_soft_slope_and_some_noise_are_plain():
    picture, alpha = disc(20, (0.5, 0.6, 0.9))
    slope = np.linspace(-0.08, 0.08, 64)[:, None, None] * (1 - alpha[..., None])
    noise = np.random.default_rng(1).normal(0, 0.01, picture.shape)
    found = keyed((picture + slope + noise).clip(0, 1))
    np.testing.assert_allclose(found[..., 3], alpha, atol=0.15)
    assert np.abs(found[..., 3] - alpha).mean() < 0.01


def test_a_bust_may_be_cut_off_by_an_edge():
    picture, alpha = disc(20, BLUE)
    found = keyed(picture[:34])
    np.testing.assert_allclose(found[..., 3], alpha[:34], atol=0.1)


def test_holes_are_seen_through_in_strong_colours_only():
    for behind, through in ((BLUE, True), (WHITE, False)):
        outer, inner = disc(20, behind)[1], disc(8, behind)[1]
        alpha = (outer - inner)[..., None]
        found = keyed(alpha * (0.8, 0.2, 0.1) + (1 - alpha) * behind)
        assert (found[32, 32, 3] == 0) == through


def test_what_has_no_plain_border_is_not_keyed():
    y, x = np.mgrid[:64, :64]
    stripes = np.where((x // 8 % 2)[..., None], (0.2, 0.5, 0.9), (0.9, 0.8, 0.3))
    assert keyed(stripes) is None
    landscape = np.where((y > 30)[..., None], (0.3, 0.6, 0.2), (0.5, 0.7, 1.0))
    assert keyed(landscape) is None
    assert keyed(np.random.default_rng(2).random((64, 64, 3))) is None


def test_an_empty_picture_is_all_background():
    assert (keyed(np.full((16, 24, 3), 0.5))[..., 3] == 0).all()
