"""Pictures in every format carry their request, and other readers find it."""

import io
import os
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.images import formats
from ldm.images.formats import Encoding, encode, encoding_of
from ldm.images.parameters import format_parameters, parse_parameters
from ldm.images.png import read_fields, read_request, save_png
from ldm.images.texts import read_own
from ldm.request import Request

REQUEST = Request(
    prompt='eine "Brücke", <b>橋</b> & ⛵\U0001f600\uffff\x07\nzwei Zeilen: ]]>',
    negative_prompt="fog",
    height=96,
    width=128,
    num_inference_steps=20,
    guidance_scale=7.0,
    seeds=(2**63 - 1,),
    sampler="euler",
)
LOSSY = ("jpeg", "webp", "avif")


def picture(size=(64, 48)):
    ramp = np.indices((size[1], size[0])).sum(0) * 2
    return Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", LOSSY)
def test_another_reader_finds_what_automatic1111_writes(tmp_path, name):
    path = save_png(picture(), tmp_path / "a", REQUEST, Encoding(name))
    with Image.open(path) as image:
        assert image.format == name.upper()
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        packet = image.info["xmp"]
    assert comment[:8] == b"UNICODE\0"
    text = comment[8:].decode("utf-16-be")
    assert text == format_parameters(REQUEST)
    assert parse_parameters(text).replace(model=None) == REQUEST.replace(model=None)
    tree = ElementTree.fromstring(packet.strip(b"\0"))
    (described,) = tree.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
    # Two of the prompt's characters are none of XML's.
    assert described.text == text.replace("\uffff", "\ufffd").replace("\x07", "\ufffd")


@pytest.mark.parametrize("name", ["png", *LOSSY])
def test_the_whole_request_is_read_back(tmp_path, name):
    request = REQUEST.replace(timesteps=(900.5, 1), sampler=None, prompt_2="only here", clip_skip=1)
    path = save_png(picture(), tmp_path / "a", request, Encoding(name))
    assert read_request(path) == request
    assert Request.from_json(read_own(path)) == request
    assert dict(read_fields(path))["prompt_2"] == "only here"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [("png", {}, True), ("webp", {"lossless": True}, True), ("webp", {}, False), ("jpeg", {}, False)],
)
def test_which_formats_keep_every_pixel(tmp_path, name, options, exact):
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    path = save_png(Image.fromarray(noise), tmp_path / "a", REQUEST, Encoding(name, **options))
    with Image.open(path) as image:
        assert np.array_equal(image.convert("RGB"), noise) == exact


@pytest.mark.parametrize("name", LOSSY)
def test_quality_makes_files_larger_and_truer(name):
    found = []
    for quality in (10, None, 98):
        data = io.BytesIO()
        encode(picture(), data, {}, Encoding(name, quality))
        with Image.open(data) as image:
            error = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(picture(), int)).mean()
        found.append((len(data.getvalue()), error))
    sizes, errors = zip(*found, strict=True)
    assert sizes[0] < sizes[1] < sizes[2]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", LOSSY)
def test_noise_of_the_highest_quality_is_written(tmp_path, name):
    """Pillow's buffer for an optimised JPEG holds no more than two bytes a pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    path = save_png(Image.fromarray(noise), tmp_path / "a", REQUEST, Encoding(name, 100))
    assert read_request(path) == REQUEST
    with Image.open(path) as image:
        assert np.abs(np.asarray(image.convert("RGB"), int) - noise).mean() < 60  # of another noise 85


def test_a_text_too_long_for_a_jpeg_is_told_and_the_picture_is_there(tmp_path):
    long = REQUEST.replace(prompt="a" * 50_000)  # in EXIF two bytes each
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_request(save_png(picture(), tmp_path / "a.jpg", long, Encoding("jpeg"))) == long
    wide = REQUEST.replace(prompt="橋" * 30_000)  # in XMP three bytes each
    with pytest.warns(UserWarning, match="does not say all of how it was drawn"):
        path = save_png(picture(), tmp_path / "a.jpg", wide, Encoding("jpeg"))
    assert read_request(path).prompt == wide.prompt
    longer = REQUEST.replace(prompt="a" * 70_000)
    with pytest.warns(UserWarning, match="does not say how it was drawn"):
        path = save_png(picture(), tmp_path / "b.jpg", longer, Encoding("jpeg"))
    with pytest.raises(UserError, match="does not say how it was drawn"):
        read_request(path)
    assert read_request(save_png(picture(), tmp_path / "b.webp", longer, Encoding("webp"))) == longer


def test_the_encoding_is_named_or_follows_from_the_suffix():
    assert encoding_of(None) == Encoding("png")
    assert encoding_of(Path("a.JPG")).format == "jpeg"
    assert encoding_of(Path("a.webp"), None, 50) == Encoding("webp", 50)
    assert encoding_of(Path("a.avif"), "avif").suffix == ".avif"
    assert encoding_of(None, lossless=True) == Encoding("webp", lossless=True)
    assert [Encoding(name).suffix for name in ("png", "jpeg", "webp")] == [".png", ".jpg", ".webp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Path("a.gif"),), r"a\.gif must name a \.png, \.jpg, \.jpeg, \.webp or \.avif file"),
        ((Path("a"),), "must name a"),
        ((Path("a.webp"), "png"), "a.webp is no file of png"),
        ((None, "png", 90), "a lossless picture has no quality"),
        ((None, "webp", 90, True), "a lossless picture has no quality"),
        ((None, "jpeg", None, True), "jpeg is never lossless"),
        ((None, "avif", None, True), "avif is never lossless"),
        ((None, "webp", 0), "quality 0 is not allowed"),
        ((None, "jpeg", 101), "quality 101 is not allowed"),
        ((None, "gif"), "format 'gif' is not allowed"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        encoding_of(*arguments)


def test_a_pillow_without_avif_says_so(monkeypatch):
    monkeypatch.delitem(Image.SAVE, "AVIF")
    with pytest.raises(UserError, match=r"this Pillow writes no avif: pip install 'pillow>=11.3'"):
        Encoding("avif")


def test_a_picture_too_large_for_its_format_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(formats.MAX_SIDE, "webp", 63)
    with pytest.raises(UserError, match="webp cannot hold 64x48 pixels: give --format png"):
        save_png(picture(), tmp_path / "a.webp", REQUEST, Encoding("webp"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["png", *LOSSY])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, name):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    open_file = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **o: Full() if mode == "wb" else open_file(self, mode, **o)
    )
    with pytest.raises(UserError, match=r"cannot write to .*a: No space left on device$"):
        save_png(picture(), tmp_path / "a", REQUEST, Encoding(name))
    assert os.listdir(tmp_path) == []
