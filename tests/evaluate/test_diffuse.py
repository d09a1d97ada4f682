"""`ldm diffuse`: what its sheet shows is the process that it says."""

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import PURE_NOISE
from ldm.evaluate.diffuse import CAPTION, _caption, diffuse_sheet, noised, timesteps
from ldm.images.pixels import GRID_GAP


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


@pytest.fixture
def picture(tmp_path, pipe):
    height, width = pipe.resolve(ldm.Request()).size
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def cell(sheet, size, column, row):
    """A picture of the sheet, [H, W, 3]."""
    width, height = size
    left = GRID_GAP + column * (width + GRID_GAP)
    top = GRID_GAP + row * (height + CAPTION + GRID_GAP)
    return np.asarray(sheet.crop((left, top, left + width, top + height)), np.float64)


def test_timesteps_span_training():
    assert timesteps(1000, 4) == [0, 333, 666, 999]
    assert timesteps(10, 2) == [0, 9]
    with pytest.raises(ldm.UserError, match="1 columns are not allowed: give 2 to 20"):
        timesteps(1000, 1)


def test_noise_of_unit_pictures_keeps_unit_variance():
    a = torch.linspace(0.99, 0.01, 50, dtype=torch.float64)
    x0, noise = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    assert [float(x.std()) for x in noised(x0, noise, a, [0, 25, 49])] == pytest.approx([1, 1, 1], abs=0.03)


def test_the_sheet_shows_both_processes(pipe, picture):
    with Image.open(picture) as image:
        sheet = diffuse_sheet(pipe, image, "a red boat", columns=3, seed=4)
        size, original = image.size, np.asarray(image, np.float64)
    a = pipe.schedule.alphas_cumprod[timesteps(1000, 3)].numpy()
    noise = Noise([4]).initial((3, size[1], size[0]))[0].permute(1, 2, 0).numpy()
    for column in range(3):
        x = a[column] ** 0.5 * (original / 127.5 - 1) + (1 - a[column]) ** 0.5 * noise
        wanted = ((x / 2 + 0.5).clip(0, 1) * 255).round()
        assert np.abs(cell(sheet, size, column, 0) - wanted).max() <= 1
    # The way back begins with the last state of the way there.
    assert np.array_equal(cell(sheet, size, 2, 1), cell(sheet, size, 2, 2))
    assert not np.array_equal(cell(sheet, size, 1, 1), cell(sheet, size, 1, 2))


def test_the_command_writes_it(tiny_folder, picture, tmp_path, capsys):
    model = ["-m", str(tiny_folder), "--device", "cpu", "--dtype", "fp32"]
    output = tmp_path / "sheet.png"
    assert cli.main(["diffuse", str(picture), "-o", str(output), "--columns", "2", *model]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with Image.open(output) as sheet, Image.open(picture) as image:
        assert sheet.width == 2 * (image.width + GRID_GAP) + GRID_GAP


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.png"], "cannot read the picture none.png: No such file"),
        (["picture.png", "-o", "sheet.jpg"], "--output sheet.jpg must name a .png file"),
        (["picture.png", "--columns", "500"], "500 columns are not allowed: give 2 to 20"),
    ],
)
def test_mistakes_are_told(argv, message, tiny_folder, picture, monkeypatch, capsys):
    monkeypatch.chdir(picture.parent)
    assert cli.main(["diffuse", *argv, "-m", str(tiny_folder), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_pure_noise_is_said_to_be_infinite():
    """1e10 stands for it within the code only."""
    assert _caption(999, torch.tensor(PURE_NOISE)) == "t 999\nsigma infinite\nSNR 0"
    assert _caption(10, torch.tensor(0.5)) == "t 10\nsigma 0.5\nSNR 4"
