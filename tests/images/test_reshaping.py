"""Images in another shape, as A1111's resize modes 1 and 2 make them."""

import numpy as np
import pytest
from PIL import Image

from ldm.images.fitting import reshaped


def noise(width, height, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (40, 40), (33, 47)])
@pytest.mark.parametrize("own", [(60, 20), (20, 60), (30, 30), (31, 17)])
def test_crop_covers_all_and_keeps_the_shape(own, size):
    (width, height), (h, w) = own, size
    image = noise(width, height)
    # A1111's whole numbers: the side that is nearer to its target is exact, the other is rounded down.
    scaled = (width * h // height, h) if width * h > w * height else (w, height * w // width)
    whole = np.asarray(image.resize(scaled, Image.Resampling.LANCZOS))
    left, top = -(w // 2 - scaled[0] // 2), -(h // 2 - scaled[1] // 2)
    assert (np.asarray(reshaped(image, size, "crop")) == whole[top : top + h, left : left + w]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_fill_lies_within_and_repeats_its_edges(channels):
    image = noise(60, 20, channels)
    out = np.asarray(reshaped(image, (48, 32), "fill"))
    small = np.asarray(image.resize((32, 20 * 32 // 60), Image.Resampling.LANCZOS))
    top = 48 // 2 - small.shape[0] // 2
    assert (out[top : top + len(small)] == small).all()
    assert (out[:top] == small[0]).all()
    assert (out[top + len(small) :] == small[-1]).all()
    tall = np.asarray(reshaped(noise(20, 60, channels), (32, 48), "fill"))
    assert tall.shape[:2] == (32, 48)
    assert (tall[:, :19] == tall[:, 18:19]).all()


def test_the_same_shape_is_resized_alone():
    image = noise(40, 20)
    expected = np.asarray(image.resize((20, 10), Image.Resampling.LANCZOS))
    for mode in ("crop", "fill"):
        assert (np.asarray(reshaped(image, (10, 20), mode)) == expected).all()
