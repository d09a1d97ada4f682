"""What requests begin with: another picture's, a folder's pictures, noise that is varied."""

from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from ldm.images.png import read_request


def drawn(folder="o"):
    return [read_request(path) for path in sorted(Path(folder, "samples").iterdir())]


def test_a_picture_is_drawn_as_another_was_but_for_the_flags(fake):
    assert cli.txt2img(["-p", "a boat", "-n", "fog", "-s", "7", "--steps", "2", "-o", "a.webp"]) == 0
    assert cli.txt2img(["--from-png", "a.webp", "--outdir", "same"]) == 0
    assert drawn("same") == [read_request("a.webp")]
    argv = ["--from-png", "a.webp", "-p", "a sea", "-s", "1", "--scale", "3", "-b", "2", "--outdir", "o"]
    assert cli.txt2img([*argv, "--skip-grid"]) == 0
    asked = read_request("a.webp").replace(prompt="a sea", guidance_scale=3)
    assert drawn() == [asked.replace(seeds=(1,)), asked.replace(seeds=(2,))]


def test_something_to_draw_must_be_given(fake, capsys):
    assert cli.txt2img([]) == 2
    assert "-p/--prompt --from-file is required, or --from-png" in capsys.readouterr().err


@pytest.fixture
def pictures():
    Path("in").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (16, 16)).save(Path("in", name))


def test_a_folder_is_drawn_from_picture_by_picture(fake, pictures):
    assert cli.txt2img(["-p", "a", "-i", "in", "--outdir", "o", "--skip-grid"]) == 0
    assert [(Path(r.image).name, r.seeds) for r in drawn()] == [("a.png", (42,)), ("b.jpg", (42,))]


def test_a_plot_is_of_one_picture(fake, pictures, capsys):
    assert cli.txt2img(["-p", "a", "-i", "in", "--plot", "cfg=1,2"]) == 2
    assert "--plot draws from one picture" in capsys.readouterr().err


def test_variations_of_one_seed(fake):
    argv = ["-p", "a", "--variation-seed", "5", "--variation-strength", "0.1", "-b", "3", "--outdir", "o"]
    assert cli.txt2img([*argv, "--skip-grid"]) == 0
    assert [(r.seeds, r.variation_seed) for r in drawn()] == [((42,), 5), ((42,), 6), ((42,), 7)]
