"""Broken pictures of every kind in a folder to train on: each is named, none crashes, none is changed."""

import numpy as np
import pytest
from broken_pictures import (
    GIF,
    HALF,
    JPEG,
    PNG,
    WEBP,
    encoded,
    examine_pictures,
    exif,
    found_in,
    huge_png,
    make_folder,
    scene,
)
from PIL import Image

import ldm
from ldm.images.opening import open_picture


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("half.jpg", JPEG[: len(JPEG) // 2], "truncated"),
        ("end.jpg", JPEG[:-2], "truncated"),
        ("half.png", PNG[: len(PNG) // 2], "truncated"),
        ("flip.png", PNG[:3000] + bytes([PNG[3000] ^ 255]) + PNG[3001:], "truncated"),
        ("half.webp", WEBP[: len(WEBP) // 2], "truncated"),
        ("half.gif", GIF[: len(GIF) // 2], "truncated"),
        ("empty.png", b"", "unreadable"),
        ("page.jpg", b"<!DOCTYPE html><html>404</html>", "not an image"),
        ("noise.webp", bytes(range(256)) * 9, "not an image"),
        ("bomb.png", huge_png(60_000), "too large"),
        ("promise.png", huge_png(5_000), "truncated"),
        ("float.tif", encoded(Image.new("F", (64, 64), 0.5), "TIFF"), "unreadable"),
    ],
)
def test_files_that_cannot_be_trained_on(folder, name, data, kind):
    (folder / name).write_bytes(data)
    examined = examine_pictures(folder)
    assert found_in(folder) == [("skipped", kind, name)]
    assert [example.path.name for example in examined.examples] == ["good.png"]
    assert examined.can_train
    with pytest.raises(ldm.UserError, match=name):
        open_picture(folder / name)


def test_a_web_page_is_called_one(folder):
    (folder / "page.jpg").write_text("\n<html>moved</html>")
    texts = [found.text for found in examine_pictures(folder).findings if found.kind == "not an image"]
    assert texts == ["its content is no picture but a web page: it is skipped"]


def test_nothing_readable_stops(folder):
    (folder / "good.png").write_bytes(b"")
    assert found_in(folder) == [("stops", "no pictures", None), ("skipped", "unreadable", "good.png")]


def close(image, expected, levels=1.0):
    """Whether two pictures are of one size, and differ by fewer levels on average."""
    return image.size == expected.size and np.abs(np.subtract(image, expected, dtype=float)).mean() < levels


GREY = scene(2).convert("L")
ON_WHITE = np.asarray(HALF, dtype=float)
ON_WHITE = ON_WHITE[..., :3] * ON_WHITE[..., 3:] / 255 + 255 - ON_WHITE[..., 3:]
ON_WHITE = Image.fromarray(ON_WHITE.round().astype(np.uint8))
CLEAR = Image.new("P", (96, 72), 1)
CLEAR.putpalette([0, 0, 0, 200, 30, 30])
CLEAR.paste(0, (0, 0, 48, 72))
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
CMYK = scene(4, mode="CMYK")
FRAMES = {"save_all": True, "append_images": [scene(6), scene(7)]}
WHITE_RED = Image.new("RGB", (96, 72), (200, 30, 30))
WHITE_RED.paste("white", (0, 0, 48, 72))


@pytest.mark.parametrize(
    ("name", "data", "kind", "expected"),
    [
        ("cmyk.jpg", encoded(CMYK, "JPEG", quality=98), "CMYK", CMYK.convert("RGB")),
        ("deep.png", encoded(DEEP, "PNG"), "16-bit", GREY.convert("RGB")),
        ("deep.tif", encoded(DEEP, "TIFF"), "16-bit", GREY.convert("RGB")),
        ("rgba.png", encoded(HALF, "PNG"), "alpha", ON_WHITE),
        ("clear.png", encoded(CLEAR, "PNG", transparency=0), "alpha", WHITE_RED),
        (
            "moving.gif",
            encoded(scene(5).quantize(), "GIF", **FRAMES),
            "animated",
            scene(5).quantize().convert("RGB"),
        ),
        ("moving.webp", encoded(scene(5), "WEBP", lossless=True, **FRAMES), "animated", scene(5)),
        ("moving.png", encoded(scene(5), "PNG", **FRAMES), "animated", scene(5)),
    ],
)
def test_files_that_are_fixed_when_loaded(folder, name, data, kind, expected):
    (folder / name).write_bytes(data)
    assert found_in(folder) == [("fixed", kind, name)]
    opened = open_picture(folder / name)
    assert opened.mode == "RGB"
    assert close(opened, expected, levels=2.0)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_pictures_are_turned_upright(folder, orientation, form):
    """Each orientation against the meaning that the EXIF standard gives it: where row 0 and column 0 lie."""
    upright = scene(8)
    levels = np.asarray(upright)
    # orientation -> whether rows and columns are swapped, then which of the axes run backwards
    swapped, down, across = {
        2: (False, False, True),
        3: (False, True, True),
        4: (False, True, False),
        5: (True, False, False),
        6: (True, True, False),
        7: (True, True, True),
        8: (True, False, True),
    }[orientation]
    stored = levels.transpose(1, 0, 2) if swapped else levels
    stored = stored[:: -1 if down else 1, :: -1 if across else 1]
    values = {"quality": 98} if form == "JPEG" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif(orientation), **values)
    name = f"turned.{form.lower()}"
    (folder / name).write_bytes(data)
    assert close(open_picture(folder / name), upright, levels=2.0)
    (example,) = (example for example in examine_pictures(folder).examples if example.path.name == name)
    assert example.size == (72, 96)
    if form != "TIFF":  # Pillow turns those by itself
        assert found_in(folder) == [("fixed", "EXIF-rotated", name)]


def test_a_turned_copy_looks_the_same(folder):
    scene(0).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif(6), quality=95)
    assert ("note", "near duplicate", "turned.jpg") in found_in(folder)


def test_opaque_pictures_with_an_alpha_channel_are_no_finding(folder):
    scene(9).convert("RGBA").save(folder / "opaque.png")
    assert found_in(folder) == []


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_costs_no_picture(folder):
    broken = encoded(scene(9), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x00")
    (folder / "odd.jpg").write_bytes(broken)
    assert found_in(folder) == []
    assert open_picture(folder / "odd.jpg").size == (96, 72)


def test_plain_pictures_of_other_colours_are_not_alike(folder):
    for i, colour in enumerate(("red", "blue", "white", "black")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{i}.png")
    assert found_in(folder) == []


def test_tiny_and_extreme(folder):
    scene(1, (40, 31)).save(folder / "tiny.png")
    scene(2, (32, 96)).save(folder / "just.png")
    scene(3, (97, 32)).save(folder / "wide.png")
    assert found_in(folder) == [("note", "extreme aspect", "wide.png"), ("note", "tiny", "tiny.png")]
