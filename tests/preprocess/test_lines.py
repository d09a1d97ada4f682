"""Edges and lines against closed forms, and against scipy in float64."""

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ldm.errors import UserError
from ldm.preprocess import preprocess

pytest.importorskip("cv2", reason="no OpenCV: pip install 'ldm[control]'", exc_type=ImportError)


def square(low=0, high=255, side=32):
    """`high` from pixel 8 to pixel 23 of both sides, else `low`."""
    picture = np.full((side, side, 3), low, np.uint8)
    picture[8:24, 8:24] = high
    return picture


def step(low, high, shape=(24, 40)):
    picture = np.full((*shape, 3), low, np.uint8)
    picture[:, shape[1] // 2 :] = high
    return picture


def smooth(seed=0, shape=(37, 52)):
    """Patches of all sizes, in colour, uint8."""
    noise = np.random.default_rng(seed).normal(size=(*shape, 3))
    waves = sum(gaussian_filter(noise, (s, s, 0)) * s for s in (1, 3, 6))
    return ((waves - waves.min()) / np.ptp(waves) * 255).astype(np.uint8)


def blurred(values, sigma):
    """By a Gaussian of float64, mirrored about the outermost pixels."""
    reach = int(4 * sigma + 0.5)
    sides = (sigma, sigma, 0)[: values.ndim]
    return gaussian_filter(
        values.astype(np.float64), sides, mode="mirror", radius=(reach, reach, 0)[: values.ndim]
    )


def luminance(picture):
    return picture.astype(np.float64) @ [0.299, 0.587, 0.114] / 255


def levels(values):
    return np.rint(np.clip(values, 0, 1) * 255)


def test_canny_gives_a_squares_outline():
    edges = preprocess(square(), "canny")
    assert edges.shape == (32, 32, 3)
    assert edges.dtype == np.uint8
    assert {*edges.flat} == {0, 255}
    assert (edges == edges[..., :1]).all()
    line = edges[..., 0] > 0
    near = np.zeros_like(line)
    near[7:25, 7:25] = True
    near[9:23, 9:23] = False
    assert not line[~near].any(), "an edge lies at most a pixel from where the picture changes"
    for axis, inner in ((1, line[10:22]), (0, line[:, 10:22])):
        assert (inner.sum(axis) == 2).all(), "one pixel wide, closed"


@pytest.mark.parametrize("contrast", [40, 60])
def test_cannys_thresholds_are_sobels_gradients(contrast):
    """Of a vertical step of contrast c, |gx| + |gy| is 4 c."""
    picture = step(50, 50 + contrast)
    for high, found in ((4 * contrast - 1, True), (4 * contrast + 1, False)):
        assert preprocess(picture, "canny", low=0, high=high).any() == found


def test_canny_goes_on_from_low_where_it_began_at_high():
    picture = step(0, 100, (24, 40))
    picture[12:, 20:] = 40  # a gradient of 160 below one of 400
    both = preprocess(picture, "canny", low=100, high=300)[..., 0] > 0
    assert both[3:9].any(1).all()
    assert both[15:22].any(1).all()
    strong = preprocess(picture, "canny", low=300, high=300)[..., 0] > 0
    assert strong[3:9].any(1).all()
    assert not strong[15:22].any()


def test_a_soft_edge_is_as_bright_as_its_contrast():
    """At the middle of a step, sigma sqrt(2 pi) |dG_sigma/dx| is the contrast."""
    found = preprocess(step(40, 140), "softedge", sigma=3, gain=1)
    assert found.max() == pytest.approx(100, abs=4)  # half a pixel from the middle
    columns = found[12, :, 0].astype(float)
    middle = 19.5
    for x in (14, 17, 22, 25):
        assert columns[x] == pytest.approx(100 * math.exp(-((x - middle) ** 2) / 18), abs=3)


@pytest.mark.parametrize("sigma", [0.7, 1.5, 4.0])
def test_soft_edges_in_float64(sigma):
    picture = smooth()
    down, across = np.gradient(blurred(picture / 255.0, sigma), axis=(0, 1))
    expected = levels(2 * sigma * math.sqrt(2 * math.pi) * np.hypot(down, across).max(2))
    found = preprocess(picture, "softedge", sigma=sigma)
    assert np.abs(found[..., 0] - expected).max() <= 2


def test_lines_in_float64():
    picture, y = smooth(1), luminance(smooth(1))
    dog = levels(16 * (blurred(y, 1.6) - blurred(y, 1.0)))
    assert dog.max() > 100
    assert np.abs(preprocess(picture, "lineart")[..., 0] - dog).max() <= 2
    sharp = 21 * blurred(y, 0.8) - 20 * blurred(y, 0.8 * 1.6)
    ink = levels(np.where(sharp < 0.5, -np.tanh(10 * (sharp - 0.5)), 0))
    found = preprocess(picture, "lineart_xdog")[..., 0]
    assert np.quantile(np.abs(found - ink), 0.99) <= 4  # fp32 and the kernels' ends, 210 times larger
    values = picture.astype(np.float64)
    difference = 2 * (blurred(values, 5.0) - blurred(values, 0.5)).min(2)
    found = preprocess(picture, "scribble_xdog")[..., 0]
    clear = np.abs(difference - 32) > 0.1
    assert (found[clear] == (difference > 32)[clear] * 255).all()
    assert 0 < found.mean() < 128


def test_a_dark_line_is_drawn_and_a_bright_one_is_not():
    picture = np.full((21, 21, 3), 200, np.uint8)
    picture[:, 5] = 0
    picture[:, 15] = 255
    found = preprocess(picture, "lineart")[10, :, 0]
    assert found[5] == 255
    assert found[15] == 0
    assert found[10] == 0


def test_thresholds_the_wrong_way_round():
    with pytest.raises(UserError, match="low 300 is above high 200"):
        preprocess(square(), "canny", low=300)
