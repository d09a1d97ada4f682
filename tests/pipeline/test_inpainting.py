"""Masks, and pictures that are drawn again from the files they were drawn from."""

import hashlib
import shutil
import warnings

import numpy as np
import pytest
import torch
from family_inputs import INPUTS, mask, picture
from PIL import Image

import ldm
from ldm import cli
from ldm.images.fitting import fit_mask, take


@pytest.mark.parametrize("family", ["inpaint", "inpaint_xl", "sd1", "sdxl", "lcm"])
def test_pixels_outside_the_mask_are_untouched(models, family):
    given = {"image": picture(), "mask_image": mask()} | INPUTS[family]
    (drawn,) = models(family)("sea", num_inference_steps=2, seed=1, **given).images
    same = np.asarray(drawn) == np.asarray(picture())
    kept = np.asarray(mask()) == 0
    assert same[kept].all()
    assert same[~kept].mean() < 0.1


def test_mask_is_cut_in_the_middle():
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert fit_mask(grey, (1, 4)).flatten().tolist() == [0, 0, 1, 1]
    assert fit_mask(grey.convert("RGB"), (1, 4)).flatten().tolist() == [0, 0, 1, 1]
    assert fit_mask(take(torch.tensor([[0.0, 0.49, 0.5, 1.0]]), 1), (1, 4)).flatten().tolist() == [0, 0, 1, 1]


@pytest.fixture
def drawn_from_files(models, tmp_path):
    """A picture's request, and the files that it was drawn from."""
    picture().save(tmp_path / "photo.png")
    mask().save(tmp_path / "mask.png")
    files = {"image": tmp_path / "photo.png", "mask_image": tmp_path / "mask.png"}
    return models("inpaint")("sea", num_inference_steps=2, seed=3, **files)


def test_a_picture_of_files_is_drawn_again_from_its_request(models, tmp_path, drawn_from_files):
    request = drawn_from_files.request
    assert request.image == str(tmp_path / "photo.png")
    assert request.image_sha256 == hashlib.sha256((tmp_path / "photo.png").read_bytes()).hexdigest()
    again = models("inpaint").generate(ldm.Request.from_json(request.to_json()))
    assert np.array_equal(again.images[0], drawn_from_files.images[0])
    in_memory = models("inpaint")("sea", num_inference_steps=2, seed=3, image=picture(), mask_image=mask())
    assert np.array_equal(in_memory.images[0], drawn_from_files.images[0])


@pytest.mark.parametrize("name", ["photo.png", "mask.png"])
def test_a_changed_file_is_refused_by_name(models, tmp_path, drawn_from_files, name):
    picture(seed=2).save(tmp_path / name)
    with pytest.raises(ldm.UserError, match=f"{name} has changed"):
        models("inpaint").generate(drawn_from_files.request)


def test_a_moved_file_is_found_where_one_says(models, tmp_path, drawn_from_files):
    shutil.move(tmp_path / "photo.png", tmp_path / "moved.png")
    with pytest.raises(ldm.UserError, match=r"cannot read the picture .*photo.png: No such file"):
        models("inpaint").generate(drawn_from_files.request)
    moved = drawn_from_files.request.replace(image=str(tmp_path / "moved.png"))
    again = models("inpaint").generate(moved)
    assert np.array_equal(again.images[0], drawn_from_files.images[0])


@pytest.fixture(params=["inpaint", "sd1"])
def family(request):
    return request.param


@pytest.fixture
def drawn_by_command(folder_of, family, tmp_path, monkeypatch):
    """Draws out.png from photo.png and mask.png, which lie beside it, and gives the model's flags."""
    monkeypatch.chdir(tmp_path)
    picture().save("photo.png")
    mask().save("mask.png")
    model = ["--model", str(folder_of(family)), "--device", "cpu", "--dtype", "fp32", "--quiet"]
    asked = ["-p", "sea", "--steps", "3", "-s", "3", "-o", "out.png"]
    files = ["-i", "photo.png", "--mask", "mask.png", "--strength", "0.7"]
    assert cli.txt2img([*model, *asked, *files]) == 0
    return model


def test_the_command_draws_what_python_draws(models, family, drawn_by_command):
    files = {"image": "photo.png", "mask_image": "mask.png"}
    (drawn,) = models(family)("sea", num_inference_steps=3, seed=3, strength=0.7, **files).images
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(drawn))


def test_a_picture_of_files_is_redrawn_and_a_changed_file_is_told(drawn_by_command, capsys):
    again = ["redraw", "out.png", *drawn_by_command]
    assert cli.main(again) == 0
    assert "equal: every pixel" in capsys.readouterr().out
    shutil.move("photo.png", "moved.png")
    assert cli.main(again) == 2
    assert "cannot read the picture photo.png" in capsys.readouterr().err
    assert cli.main([*again, "-i", "moved.png"]) == 0
    picture(seed=2).save("photo.png")
    assert cli.main(again) == 2
    assert "photo.png has changed" in capsys.readouterr().err


def test_only_what_is_painted_on_a_transparent_mask_is_drawn_anew(models):
    painted = Image.new("RGBA", (16, 16))
    painted.paste((0, 0, 0, 255), (4, 4, 12, 12))
    (drawn,) = models("inpaint")("sea", num_inference_steps=2, image=picture(), mask_image=painted).images
    same = (np.asarray(drawn) == np.asarray(picture())).all(axis=2)
    assert same[np.asarray(painted)[..., 3] == 0].all()
    assert same[4:12, 4:12].mean() < 0.1


@pytest.mark.parametrize(("size", "warns"), [((16, 16), False), ((32, 32), False), ((16, 32), True)])
def test_a_mask_of_another_shape_is_told_with_both_sizes(models, tmp_path, size, warns):
    picture().save(tmp_path / "photo.png")
    mask(*size).save(tmp_path / "mask.png")
    files = {"image": tmp_path / "photo.png", "mask_image": tmp_path / "mask.png"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        models("inpaint")("sea", num_inference_steps=2, **files)
    told = [str(each.message) for each in told if "mask" in str(each.message)]
    assert bool(told) == warns
    assert all("mask.png has 32x16 pixels and the picture it masks 16x16" in line for line in told)
