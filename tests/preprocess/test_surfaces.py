"""Colours, blurs, holes and surfaces against box means, peers and closed forms."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from ldm.errors import UserError
from ldm.images.opening import open_picture
from ldm.preprocess import control_values, preprocess, source_of
from ldm.preprocess.pictures import to_levels

pytest.importorskip("cv2", reason="no OpenCV: pip install 'ldm[control]'", exc_type=ImportError)


def noise(shape=(24, 36), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def boxes(picture, rate):
    """Means of rate x rate pixels."""
    h, w, _ = picture.shape
    return picture.reshape(h // rate, rate, w // rate, rate, 3).astype(np.float64).mean((1, 3))


@pytest.mark.parametrize("rate", [2, 3])
def test_a_tile_is_the_means_of_boxes_made_larger(rate):
    picture = noise()
    means = torch.from_numpy(boxes(picture, rate)).permute(2, 0, 1)[None]
    large = torch.nn.functional.interpolate(means, (24, 36), mode="bilinear", align_corners=False)
    found = preprocess(picture, "tile_resample", rate=rate)
    assert np.abs(found - large[0].permute(1, 2, 0).numpy()).max() <= 0.51
    assert (preprocess(picture, "tile", rate=1) == picture).all()


def test_colours_are_cells_of_their_mean():
    picture = noise()
    found = preprocess(picture, "color", cell=6)
    expected = boxes(picture, 6).repeat(6, 0).repeat(6, 1)
    assert np.abs(found - expected).max() <= 0.5
    assert len(np.unique(preprocess(picture, "color").reshape(-1, 3), axis=0)) == 1, "smaller than a cell"


def test_a_blur_in_float64():
    picture = noise()
    expected = gaussian_filter(picture.astype(np.float64), (2, 2, 0), mode="mirror", radius=(8, 8, 0))
    assert np.abs(preprocess(picture, "blur", sigma=2) - expected).max() <= 1


def test_what_is_masked_is_told_as_minus_one():
    picture, mask = noise(), np.zeros((24, 36), np.float32)
    mask[4:9, 10:20] = 1
    found = preprocess(picture, "inpaint", mask=mask)
    assert found.shape == (24, 36, 4)
    values = control_values(found)
    hidden = np.broadcast_to(mask > 0, values.shape)
    assert (values[hidden] == -1).all()
    assert np.array_equal(values[~hidden], (picture.transpose(2, 0, 1) / np.float32(255))[~hidden])
    assert np.array_equal(control_values(picture), picture.transpose(2, 0, 1) / np.float32(255))


def test_depth_is_stretched_and_nearest_is_white():
    levels = np.linspace(900, 1100, 5, dtype=np.float32)[None].repeat(3, 0)
    assert preprocess(levels, "depth")[0, :, 0].tolist() == [0, 64, 128, 191, 255]
    assert preprocess(levels, "depth", far_is_white=True)[0, :, 0].tolist() == [255, 191, 128, 64, 0]
    assert not preprocess(np.full((3, 4), 7, np.float32), "depth").any(), "without relief"


def test_normals_of_planes():
    """Blue is front; a slope that faces left is red, one that faces up is green."""
    rise = np.linspace(0, 1, 41, dtype=np.float32)
    to_left, to_top = np.tile(rise, (41, 1)), np.tile(rise[:, None], (1, 41))
    slope = 0.5 * 41 / 40
    expected = np.array([slope, 0, 1]) / np.hypot(slope, 1)
    assert np.abs(preprocess(to_left, "normal")[20, 20] - (expected + 1) / 2 * 255).max() <= 1
    assert np.abs(preprocess(to_top, "normal")[20, 20] - (expected[[1, 0, 2]] + 1) / 2 * 255).max() <= 1
    away = preprocess(to_left, "normal", far_is_white=True)[20, 20]
    assert np.abs(away - (expected * [-1, 1, 1] + 1) / 2 * 255).max() <= 1
    flat = preprocess(to_left, "normal", background=0.5)
    assert (flat[:, :20] == [128, 128, 255]).all()
    assert (flat[:, 25:, 0] > 150).all()


def test_normals_of_a_sphere():
    """z = sqrt(r^2 - x^2 - y^2) has the normals (x, y, z) / r."""
    side, radius = 201, 90.0
    y, x = np.mgrid[:side, :side] - 100.0
    z = np.sqrt(np.clip(radius**2 - x**2 - y**2, 0, None)).astype(np.float32)
    found = preprocess(z, "normal", relief=radius / side) / 127.5 - 1
    inside = x**2 + y**2 < (0.8 * radius) ** 2
    expected = np.stack([-x, -y, z], 2) / radius
    assert np.abs(found - expected)[inside].max() < 0.02


def test_a_map_of_16_bits_keeps_its_steps(tmp_path):
    """Of a sensor in millimetres: 8 bits would leave two steps of these."""
    Image.fromarray(np.linspace(1000, 1500, 8).astype(np.uint16)[None].repeat(4, 0)).save(tmp_path / "d.png")
    levels = source_of(open_picture(tmp_path / "d.png", None, to_levels))
    assert levels.shape == (4, 8)
    assert levels.dtype == np.float32
    assert len(np.unique(preprocess(levels, "depth"))) == 8
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(UserError, match="NaN or Inf"):
        open_picture(tmp_path / "nan.tiff", None, to_levels)


def test_classes_have_their_colours():
    """ADE20K's 0, 2 and 149: wall, sky and flag."""
    classes = np.array([[0, 2], [149, 12]], np.float32)
    found = preprocess(noise((2, 2)), "seg", estimator=lambda picture: classes)
    assert found.tolist() == [[[120, 120, 120], [6, 230, 230]], [[92, 0, 255], [150, 5, 61]]]
    with pytest.raises(UserError, match="0 to 149"):
        preprocess(noise((2, 2)), "seg", estimator=lambda picture: classes + 1)
    with pytest.raises(UserError, match="--segmentation-model FOLDER"):
        preprocess(noise((2, 2)), "seg")


@pytest.mark.parametrize(
    ("mask", "said"), [(None, "needs a mask"), (np.zeros((3, 4), np.float32), "the mask is 4 x 3 pixels")]
)
def test_a_mask_that_does_not_fit(mask, said):
    with pytest.raises(UserError, match=said):
        preprocess(noise(), "inpaint", mask=mask)


def test_inverted():
    assert np.array_equal(preprocess(noise(), "invert"), 255 - noise())
