"""Texts in EXIF, as other programs write them into JPEG and WebP."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.images.png import read_fields, read_request
from ldm.images.texts import decode_comment

TEXT = "ein Schloß, 橋 ⛵\nNegative prompt: fog\nSteps: 5, Sampler: DDIM, Seed: 9, Size: 64x64"
CODES = {
    "UTF-16 BE": b"UNICODE\0" + TEXT.encode("utf-16-be"),  # piexif's, and so AUTOMATIC1111's
    "UTF-16 LE": b"UNICODE\0" + TEXT.encode("utf-16-le"),
    "with a mark": b"UNICODE\0" + TEXT.encode("utf-16"),
    "UTF-8": b"ASCII\0\0\0" + TEXT.encode() + b"\0",
    "no code": b"\0" * 8 + TEXT.encode(),
    "nothing before": TEXT.encode(),
}


def save(path, comment, **options):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (64, 64)).save(path, exif=exif.tobytes(), **options)
    return path


@pytest.mark.parametrize("code", CODES)
def test_user_comments_in_each_encoding(code):
    assert decode_comment(CODES[code]) == TEXT


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png", "a.avif"])
def test_the_comment_is_read_in_each_kind_of_file(tmp_path, name):
    request = read_request(save(tmp_path / name, CODES["UTF-16 BE"]))
    assert (request.prompt, request.negative_prompt) == ("ein Schloß, 橋 ⛵", "fog")
    assert (request.sampler, request.seeds, request.size) == ("ddim", (9,), (64, 64))


def test_a_comment_of_a_gif(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.gif", comment=TEXT.encode())
    assert read_request(tmp_path / "a.gif").seeds == (9,)


@pytest.mark.parametrize(
    "comment", [b"", b"ASCII\0\0\0Screenshot", b"UNICODE\0\0", b"UNICODE\0\xd8", b"\xff" * 9]
)
def test_a_comment_without_settings_says_nothing(tmp_path, comment):
    with pytest.raises(UserError, match="does not say how it was drawn"):
        read_request(save(tmp_path / "a.jpg", comment))


def test_our_own_chunk_and_parameters_go_before_a_comment(tmp_path):
    chunks = PngInfo()
    chunks.add_itxt("parameters", "a castle\nSteps: 7, Seed: 3")
    save(tmp_path / "a.png", CODES["UTF-8"], pnginfo=chunks)
    assert read_request(tmp_path / "a.png").seeds == (3,)


def test_texts_of_programs_that_are_not_read_are_named(tmp_path):
    chunks = PngInfo()
    chunks.add_text("workflow", "{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(
        UserError, match=r"does not say how it was drawn.* of another program it has workflow"
    ):
        read_request(tmp_path / "a.png")


@pytest.mark.parametrize(
    "own",
    [
        '{"version": 2, "prompt": "sea", "sampler": "new"}',
        '{"version": 1, "prompt": "sea", "sampler": "dpm++ 3m", "height": 5}',
        '{"version": 1, "prompt": "sea", "sampler": "ddim", "upscaling": 5}',
        '{"version": 1, "prompt": "<lora:a>", "sampler": "ddim", "loras": 5}',
    ],
)
def test_fields_are_shown_even_if_they_cannot_be_drawn(tmp_path, own):
    chunks = PngInfo()
    chunks.add_text("ldm", own)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    assert {"prompt", "sampler"} <= dict(read_fields(tmp_path / "a.png")).keys()
    with pytest.raises(UserError, match="does not say what can be drawn"):
        read_request(tmp_path / "a.png")


@pytest.mark.parametrize("own", ["[" * 100_000, '{"version": 1, "upscaling": ' * 500 + "{}" + "}" * 500, "{"])
def test_a_damaged_chunk_leaves_the_parameters_to_be_shown(tmp_path, own):
    chunks = PngInfo()
    chunks.add_text("ldm", own)
    chunks.add_text("parameters", "a castle\nSteps: 7, Seed: 3")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    assert read_fields(tmp_path / "a.png")
    with pytest.raises(UserError, match="does not say what can be drawn"):
        read_request(tmp_path / "a.png")
