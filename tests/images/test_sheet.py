"""Labels and tables."""

import numpy as np
import pytest
from PIL import Image

from ldm.images.pixels import contact_sheet
from ldm.images.sheet import MAX_PIXELS, MAX_SIDE, captioned, label, shrinking, shrunk, table


def block(size, colour):
    return Image.new("RGB", size, colour)


def test_a_table_puts_each_image_in_the_middle_of_its_place():
    red, blue, tall = block((10, 4), "red"), block((4, 6), "blue"), block((6, 20), "green")
    sheet = table([[red, None], [blue, tall]], gap=2)
    assert sheet.size == (10 + 2 + 6, 4 + 2 + 20)
    assert sheet.crop((0, 0, 10, 4)).tobytes() == red.tobytes()
    assert sheet.crop((3, 13, 7, 19)).tobytes() == blue.tobytes()
    assert sheet.crop((12, 6, 18, 26)).tobytes() == tall.tobytes()
    assert sheet.getpixel((17, 2)) == (255, 255, 255)


@pytest.mark.parametrize("text", ["", "7", "cfg: 4", "many words " * 50, "x" * 5000, "橋 ⛵\U0001f600 \x07"])
@pytest.mark.parametrize("width", [12, 64, 512])
def test_labels_stay_within_their_width(text, width):
    image = label(text, width, 12)
    assert image.width == width
    assert image.height < 90
    ink = np.asarray(image.convert("L")) < 128
    assert ink.any() == bool(text) or width == 12
    assert not ink[:, [0, -1]].any() or width == 12


def test_other_words_are_other_labels():
    assert label("cfg: 4", 64, 12).tobytes() != label("cfg: 7", 64, 12).tobytes()
    assert label("a\nb", 64, 12).tobytes() == label("a b", 64, 12).tobytes()


def test_a_caption_leaves_the_picture_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    with_words = captioned(image, "seed 7")
    assert with_words.crop((0, 0, 96, 64)).tobytes() == image.tobytes()
    assert with_words.width == 96
    assert 64 + 10 < with_words.height < 100


@pytest.mark.parametrize(
    ("size", "columns", "rows"),
    [
        ((512, 512), 3, 3),
        ((1024, 1024), 50, 50),
        ((4096, 4096), 9, 9),
        ((64, 64), 1, 2500),
        ((512, 64), 900, 1),
    ],
)
def test_no_sheet_is_too_large_to_be_written(size, columns, rows):
    factor = shrinking(size, columns, rows)
    width, height = (max(1, int(side * factor)) for side in size)
    whole = (columns * width + 128, rows * height + 128)
    assert factor == 1 or size != (512, 512)
    assert max(whole) <= MAX_SIDE
    assert whole[0] * whole[1] <= 1.05 * MAX_PIXELS
    assert shrunk(block((100, 50), "red"), 0.5).size == (50, 25)


def test_a_grid_of_other_sizes_keeps_them_apart():
    sheet = contact_sheet([block((8, 4), "red"), block((4, 8), "blue")], 2)
    assert sheet.size == (2 * 10 + 2, 8 + 4)
    assert sheet.crop((2, 2, 10, 6)).tobytes() == block((8, 4), "red").tobytes()
    assert sheet.crop((12, 2, 16, 10)).tobytes() == block((4, 8), "blue").tobytes()
