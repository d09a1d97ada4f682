"""Hues of sprites against colorsys and against painted squares."""

import colorsys

import numpy as np
import pytest

from ldm.postcards.sprites.colour import BACKDROPS, HUES, _hsv, _rgb, backdrop, dominant, recolour


def square(*rgb, side=8):
    return np.broadcast_to(np.array([*rgb, 255], np.uint8), (side, side, 4)).copy()


def test_hues_are_those_of_colorsys_and_go_back():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    ours = np.stack(_hsv(pixels), -1).reshape(-1, 3)
    theirs = np.array([colorsys.rgb_to_hsv(*(each / 255)) for each in pixels.reshape(-1, 3).astype(float)])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(255 * _rgb(*_hsv(pixels)), pixels, atol=1e-3)


@pytest.mark.parametrize("rgb", [(220, 30, 30), (40, 90, 230), (30, 180, 60)])
def test_the_dominant_hue_of_one_colour(rgb):
    hue, of_coloured, of_drawn = dominant(square(*rgb))
    wanted = colorsys.rgb_to_hsv(*(each / 255 for each in rgb))[0]
    assert (hue - wanted + 0.5) % 1 == pytest.approx(0.5, abs=1e-4)
    assert (of_coloured, of_drawn) == (1, 1)


def test_what_is_not_drawn_or_has_no_colour_does_not_count():
    pixels = square(220, 30, 30)
    pixels[:, 4:] = (30, 30, 220, 0)
    assert dominant(pixels)[1:] == (1, 1)
    pixels[:, 4:] = (128, 128, 128, 255)
    assert dominant(pixels)[1:] == (1, 0.5)
    assert dominant(square(128, 128, 128)) == (0, 0, 0)


@pytest.mark.parametrize("colour", HUES)
def test_recolouring_takes_the_hue_and_leaves_the_rest(colour):
    pixels = square(200, 40, 40)
    pixels[0] = (90, 90, 90, 255)
    pixels[1] = (250, 120, 120, 255)  # a highlight
    painted = recolour(pixels, dominant(pixels)[0], colour)
    np.testing.assert_array_equal(painted[0], pixels[0])
    hue, saturation, _ = colorsys.rgb_to_hsv(*(painted[4, 4, :3] / 255))
    wanted = HUES[colour]
    assert saturation == pytest.approx(wanted[1], abs=0.03)
    if colour != "white":
        assert abs((hue - wanted[0] + 0.5) % 1 - 0.5) < 0.02
    assert painted[1].sum() > painted[4].sum() or colour in ("white", "pink", "yellow")


def test_backdrops_differ_from_each_other():
    colours = np.array([backdrop(name) for name in BACKDROPS])
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 999 * np.eye(len(colours))
    assert gaps.min() > 35
