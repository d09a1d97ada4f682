"""Pictures, their metadata, and that files appear complete or not at all."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ldm
from ldm.errors import UserError
from ldm.files import check_writable
from ldm.images import png
from ldm.images.parameters import format_parameters, parse_parameters
from ldm.images.pixels import contact_sheet, to_pil, to_tensor
from ldm.images.png import read_request, save_numbered, save_png
from ldm.request import Request

REQUEST = Request(
    prompt="a red sailboat, at sunset",
    negative_prompt="fog",
    height=96,
    width=128,
    num_inference_steps=20,
    guidance_scale=7.0,
    seeds=(1,),
    sampler="DPM++ 2M Karras",
    model="postcard: first, small",
    model_hash="0123456789",
    clip_skip=1,
)


def picture(seed=0, size=(16, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- tensors ---


def test_tensor_and_image_are_inverse():
    batch = [picture(0), picture(1)]
    tensor = to_tensor(batch)
    assert tensor.shape == (2, 3, 8, 16)
    back = to_pil(tensor)
    assert all(np.array_equal(a, b) for a, b in zip(batch, back, strict=True))


def test_rounding_is_that_of_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    tensor = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = VaeImageProcessor().postprocess(tensor * 2 - 1, output_type="pil")[0]
    assert np.array_equal(to_pil(tensor * 2 / 2)[0], theirs)


def test_values_outside_are_clipped_and_nan_is_refused():
    (image,) = to_pil(torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match="NaN"):
        to_pil(torch.full((1, 3, 2, 2), torch.nan))


def test_grid_places_pictures_row_by_row():
    batch = [picture(k) for k in range(5)]
    sheet = contact_sheet(batch, columns=3)
    assert sheet.size == (3 * 18 + 2, 2 * 10 + 2)
    fourth = sheet.crop((2, 12, 18, 20))  # first of the second row
    assert np.array_equal(fourth, batch[3])
    assert np.asarray(sheet.crop((38, 12, 54, 20))).max() == 0  # an empty place
    assert contact_sheet(batch[:1], columns=9).size == (20, 12)


# --- parameters ---


def test_parameters_text_is_exactly_this():
    assert format_parameters(REQUEST) == (
        "a red sailboat, at sunset\n"
        "Negative prompt: fog\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 128x96, "
        'Model hash: 0123456789, Model: "postcard: first, small", RNG: CPU, Clip skip: 2, '
        f"Version: ldm {ldm.__version__}"
    )


def test_parameters_without_a_negative_prompt_have_no_line_for_it():
    text = format_parameters(Request(prompt="a boat", guidance_scale=7.5, timesteps=(900, 1)))
    assert text == f"a boat\nSteps: 2, CFG scale: 7.5, Seed: 0, RNG: CPU, Version: ldm {ldm.__version__}"


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        REQUEST.replace(prompt="two\nlines: a, b", negative_prompt="x\ny"),
        REQUEST.replace(prompt="", negative_prompt=None, guidance_rescale=0.7, eta=0.5),
        REQUEST.replace(model='a "quoted", name\nin two lines', sampler="euler_a", spacing="sgm_uniform"),
        REQUEST.replace(spacing="ays", seeds=(2**63 - 1,)),
    ],
)
def test_parameters_round_trip(request_):
    assert parse_parameters(format_parameters(request_)) == request_


def test_parameters_of_another_tool():
    text = (
        "masterpiece, (a castle:1.2)\nsecond line\n"
        "Negative prompt: lowres, bad anatomy\n"
        "Steps: 28, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1234567, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Lora hashes: "a: 12, b: 34", Clip skip: 2, '
        "Version: v1.10.1"
    )
    assert parse_parameters(text) == Request(
        prompt="masterpiece, (a castle:1.2)\nsecond line",
        negative_prompt="lowres, bad anatomy",
        num_inference_steps=28,
        sampler="euler_a",
        guidance_scale=7,
        seeds=(1234567,),
        width=512,
        height=768,
        model_hash="6ce0161689",
        model="v1-5-pruned-emaonly",
        clip_skip=1,
        noise="gpu",
    )


def test_parameters_that_are_only_a_prompt():
    assert parse_parameters("a castle: big, old") == Request(prompt="a castle: big, old")


def test_parameters_with_a_value_that_cannot_be_drawn():
    with pytest.raises(UserError, match="height 'tall' is not allowed"):
        parse_parameters("a\nSteps: 3, Size: 8xtall")


# --- files ---


def test_png_carries_its_request(tmp_path):
    request = REQUEST.replace(prompt="eine Brücke, 橋 ⛵\nzwei Zeilen")
    path = save_png(picture(), tmp_path / "new" / "a.png", request)
    assert read_request(path) == request
    with Image.open(path) as image:
        assert list(image.text) == ["parameters", "ldm", "XML:com.adobe.xmp"]
        assert image.text["parameters"] == format_parameters(request)
        assert np.array_equal(image, picture())
    assert os.listdir(path.parent) == ["a.png"]


def test_read_request_of_another_tools_png(tmp_path):
    chunks = PngInfo()
    chunks.add_text("parameters", "a castle\nSteps: 5, Sampler: DDIM, CFG scale: 2.5, Seed: 9, Size: 64x64")
    picture().save(tmp_path / "a.png", pnginfo=chunks)
    request = read_request(tmp_path / "a.png")
    assert (request.sampler, request.guidance_scale, request.seeds) == ("ddim", 2.5, (9,))


def test_numbers_go_on_after_the_highest_and_nothing_is_overwritten(tmp_path):
    for name in ("00000.png", "00007.png", "00009.txt", "0001x.png"):
        (tmp_path / name).write_text("mine")
    paths = [save_numbered(picture(k), tmp_path, "%05d.png").name for k in range(2)]
    assert paths == ["00008.png", "00009.png"]
    assert (tmp_path / "00007.png").read_text() == "mine"
    (tmp_path / "grid-0099.png").touch()
    assert save_numbered(picture(), tmp_path, "grid-%04d.png").name == "grid-0100.png"
    (tmp_path / "99999.png").touch()
    assert save_numbered(picture(), tmp_path, "%05d.png").name == "100000.png"


def test_a_number_taken_at_the_last_moment_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "00000.png").write_text("of another process")
    monkeypatch.setattr(png, "_next_number", lambda folder, name: 0)
    assert save_numbered(picture(), tmp_path, "%05d.png").name == "00001.png"
    assert (tmp_path / "00000.png").read_text() == "of another process"


def test_a_folder_of_many_files_is_listed_once(tmp_path, monkeypatch):
    for k in range(png.FEW_FILES + 1):
        (tmp_path / f"photo-{k}.jpg").touch()
    (tmp_path / "00004.png").touch()
    listed, listdir = [], os.listdir
    monkeypatch.setattr(png.os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    names = [save_numbered(picture(), tmp_path, "%05d.png").name for _ in range(3)]
    (tmp_path / "00008.png").write_text("of another process")
    names += [save_numbered(picture(), tmp_path, "%05d.png").name for _ in range(2)]
    assert names == ["00005.png", "00006.png", "00007.png", "00009.png", "00010.png"]
    assert (tmp_path / "00008.png").read_text() == "of another process"
    assert len(listed) == 1
    (tmp_path / "00010.png").unlink()  # the folder was cleared: what is there counts again
    assert save_numbered(picture(), tmp_path, "%05d.png").name == "00010.png"


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(png.os, "link", no_links)
    (tmp_path / "00000.png").touch()
    assert save_numbered(picture(), tmp_path, "%05d.png", REQUEST).name == "00001.png"
    assert read_request(tmp_path / "00001.png") == REQUEST
    assert sorted(os.listdir(tmp_path)) == ["00000.png", "00001.png"]


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: save_png(picture(), folder / "a.png", REQUEST),
        lambda folder: save_numbered(picture(), folder, "%05d.png", REQUEST),
    ],
)
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, save):
    def disk_full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        save(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_get_the_permissions_that_the_user_asked_for(tmp_path):
    old = os.umask(0o027)
    try:
        path = save_png(picture(), tmp_path / "a.png")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_check_writable_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write to"):
            check_writable(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        (b"", "cannot read .* as a PNG"),
        (b"not a picture", "cannot read .* as a PNG"),
        ("truncated", "cannot read .* as a PNG"),
        ("plain", "does not say how it was drawn"),
        ("damaged", "not valid JSON"),
    ],
)
def test_read_request_refuses_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        chunks = PngInfo()
        if content == "damaged":
            chunks.add_text("ldm", "{")
        picture(size=(64, 64)).save(path, pnginfo=chunks)
        if content == "truncated":
            path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=message) as caught:
        read_request(path)
    assert "\n" not in str(caught.value)
