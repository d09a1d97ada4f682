"""Pictures say that a model drew them; what other pictures say is kept."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.images.formats import Encoding, encode
from ldm.images.png import read_request, save_new, save_numbered, save_png
from ldm.images.provenance import (
    AIGC,
    COMPOSITE,
    LABEL_FIELDS,
    SOURCE,
    SYSTEM,
    SYSTEM_VERSION,
    TRAINED,
    VOCABULARY,
    Marks,
    marks_in,
    read_label,
)
from ldm.request import Request
from ldm.version import __version__

FORMATS = ("png", "jpeg", "webp", "avif")
HOSTILE = "\"><x:y/></rdf:Description>]]>&amp;<!-- '\x07\uffff"
REQUEST = Request(prompt="a red boat", height=48, width=64, model="a model", model_hash="0123456789")


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def said(path):
    return marks_in(path.read_bytes())


@pytest.mark.parametrize("name", FORMATS)
def test_every_drawing_says_that_a_model_drew_it(tmp_path, name):
    for path in (
        save_png(picture(), tmp_path / "a", REQUEST, Encoding(name)),
        save_new(picture(), tmp_path / "b", REQUEST, Encoding(name)),
        save_numbered(picture(), tmp_path, "%05d", REQUEST, Encoding(name)),
    ):
        assert said(path) == {
            "xmp:CreatorTool": f"ldm {__version__}",
            SOURCE: "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
            SYSTEM: "a model via ldm",
            SYSTEM_VERSION: f"{__version__}, model 0123456789",
        }
        assert read_request(path) == REQUEST


@pytest.mark.parametrize("name", FORMATS)
def test_switched_off_nothing_is_said_and_the_request_is_there(tmp_path, name):
    path = save_png(picture(), tmp_path / "a", REQUEST, Encoding(name), Marks(on=False))
    assert SOURCE not in said(path)
    assert b"digitalsourcetype" not in path.read_bytes()
    assert read_request(path) == REQUEST


def test_marks_change_no_pixel_and_add_little(tmp_path):
    marked, plain = (
        save_png(picture(), tmp_path / f"{on}.png", REQUEST, marks=Marks(on=on)) for on in (True, False)
    )
    with Image.open(marked) as a, Image.open(plain) as b:
        assert np.array_equal(a, b)
    assert 0 < marked.stat().st_size - plain.stat().st_size < 1000


@pytest.mark.parametrize("name", FORMATS)
def test_sheets_say_it_where_asked_and_what_is_no_drawing_says_nothing(tmp_path, name):
    sheet = save_png(picture(), tmp_path / "a", None, Encoding(name), Marks(source=COMPOSITE))
    assert said(sheet)[SOURCE] == VOCABULARY + COMPOSITE
    photograph = save_png(picture(), tmp_path / "b", None, Encoding(name))
    assert said(photograph) == {}


@pytest.mark.parametrize("changes", [{"image": "gone.png"}, {"not_kept": ("image",)}, {"mask_grow": 3}])
def test_what_is_drawn_from_a_picture_is_composite(tmp_path, changes):
    path = save_png(picture(), tmp_path / "a", REQUEST.replace(**changes))
    assert said(path)[SOURCE] == VOCABULARY + COMPOSITE


@pytest.mark.parametrize("name", FORMATS)
def test_marks_of_the_input_are_kept(tmp_path, name):
    marks = Marks(producer="first")
    first = save_png(picture(), tmp_path / "first", REQUEST, Encoding(name), marks)
    second = REQUEST.replace(model="another", image=str(first))
    found = said(save_png(picture(1), tmp_path / "second.png", second))
    assert found[SOURCE] == VOCABULARY + TRAINED  # nobody else had part in it
    assert found[SYSTEM] == "another via ldm; a model via ldm"
    assert found[AIGC] == said(first)[AIGC]
    # Drawn once more from that, no system is named twice.
    third = REQUEST.replace(image=str(tmp_path / "second.png"))
    assert said(save_png(picture(2), tmp_path / "third", third))[SYSTEM] == "a model via ldm; another via ldm"
    composite = save_png(picture(), tmp_path / "c", REQUEST.replace(image="gone.png"), Encoding(name))
    again = said(save_png(picture(), tmp_path / "d", REQUEST.replace(image=str(composite))))
    assert again[SOURCE] == VOCABULARY + COMPOSITE


def test_marks_of_an_input_in_memory_are_kept_where_its_file_is_given(tmp_path):
    first = save_png(picture(), tmp_path / "first.png", REQUEST)
    request, marks = REQUEST.replace(not_kept=("image",)), Marks(parent=first.read_bytes())
    assert said(save_png(picture(), tmp_path / "a.png", request, marks=marks))[SOURCE] == VOCABULARY + TRAINED
    assert said(save_png(picture(), tmp_path / "b.png", request))[SOURCE] == VOCABULARY + COMPOSITE
    assert said(save_png(picture(), tmp_path / "c.png", REQUEST, marks=marks))[SYSTEM] == "a model via ldm"


def test_of_an_input_that_is_another_file_now_nothing_is_taken(tmp_path):
    first = save_png(picture(), tmp_path / "first.png", REQUEST)
    other = REQUEST.replace(image=str(first), image_sha256="0" * 64)
    assert said(save_png(picture(), tmp_path / "a.png", other))[SOURCE] == VOCABULARY + COMPOSITE


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_names_are_text(tmp_path, name):
    request = REQUEST.replace(model=HOSTILE, prompt=HOSTILE)
    path = save_png(picture(), tmp_path / "a", request, Encoding(name), Marks(producer=HOSTILE))
    found = said(path)
    assert found[SYSTEM] == HOSTILE.replace("\x07", "\ufffd").replace("\uffff", "\ufffd") + " via ldm"
    assert found[SOURCE] == VOCABULARY + TRAINED
    assert read_label(found[AIGC])["ContentProducer"] == HOSTILE
    assert read_request(path) == request


# --- the AIGC label --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_label_of_gb_45438(tmp_path, name):
    path = save_png(picture(), tmp_path / "a", REQUEST, Encoding(name), Marks(producer="某公司"))
    with Image.open(path) as image:
        image.load()
        chunk = image.text["AIGC"] if name == "png" else said(path)[AIGC]
    label = json.loads(chunk)
    assert tuple(label) == LABEL_FIELDS
    assert (label["Label"], label["ContentProducer"], label["ContentPropagator"]) == ("1", "某公司", "某公司")
    assert label["ProduceID"] == label["PropagateID"]
    marks = Marks(source=TRAINED, producer="某公司")
    again, other = (said(save_png(picture(k), tmp_path / "b", marks=marks)) for k in (0, 1))
    assert again[AIGC] == chunk
    assert other[AIGC] != chunk
    assert chunk.isascii()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"Label": "1"}', "has no ContentProducer"),
        (json.dumps(dict.fromkeys(LABEL_FIELDS, 1)), "has no Label"),
        (json.dumps(dict.fromkeys(LABEL_FIELDS, "9")), "says '9'"),
    ],
)
def test_labels_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        read_label(text)


def test_a_label_within_its_own_name():
    label = dict.fromkeys(LABEL_FIELDS, "2")
    assert read_label(json.dumps({"AIGC": label})) == label


# --- another reader --------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="no exiftool (Debian: libimage-exiftool-perl)")
@pytest.mark.parametrize("name", FORMATS)
def test_exiftool_reads_it(tmp_path, name):
    request = REQUEST.replace(model='<b>"橋"</b> & co')
    path = save_png(picture(), tmp_path / "a", request, Encoding(name), Marks(producer="me"))
    argv = ["exiftool", "-json", "-G1", "-a", "-validate", "-all", "-warning", str(path)]
    (found,) = json.loads(subprocess.run(argv, capture_output=True, check=True, text=True).stdout)
    assert found["XMP-iptcExt:DigitalSourceType"] == VOCABULARY + TRAINED
    assert found["XMP-iptcExt:AISystemUsed"] == '<b>"橋"</b> & co via ldm'
    assert found["XMP-xmp:CreatorTool"] == f"ldm {__version__}"
    assert (
        json.loads(found["XMP-TC260:AIGC"] if "XMP-TC260:AIGC" in found else said(path)[AIGC])["Label"] == "1"
    )
    assert "xmp" not in str([value for key, value in found.items() if "Warning" in key]).lower()
    if name != "png":
        assert found["ExifIFD:UserComment"].startswith("a red boat")


def test_a_stranger_that_cannot_be_read_says_nothing(tmp_path):
    assert marks_in(b"") == marks_in(b"\x89PNG\r\n\x1a\n") == {}
    path = save_png(picture(), tmp_path / "a.png", REQUEST)
    assert marks_in(path.read_bytes()[:-40]) == {}
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_jpeg_whose_prompt_is_too_long_still_says_it(tmp_path):
    long = REQUEST.replace(prompt="a" * 70_000)
    with pytest.warns(UserWarning, match="does not say how it was drawn"):
        path = save_png(picture(), tmp_path / "a.jpg", long, Encoding("jpeg"))
    assert said(path)[SOURCE] == VOCABULARY + TRAINED


def test_encode_without_an_origin_is_as_before(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        encode(picture(), file, {"a": "b"})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"a": "b"}
