"""What a PNG says of how it was drawn: `ldm info` prints it, and `ldm redraw` draws it again."""

from pathlib import Path

import numpy as np
from PIL import Image

from ldm import cli
from ldm.images.png import read_request, save_png


def test_info_prints_the_request(fake, capsys):
    cli.txt2img(["-p", "a boat", "-s", "7", "-o", "a.png", "--quiet"])
    assert cli.main(["info", "a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "prompt: a boat" in lines
    assert "seeds: (7,)" in lines
    assert "num_inference_steps: 3" in lines


def test_redraw_says_whether_the_pixels_are_equal(fake, capsys):
    assert cli.main(["txt2img", "-p", "a boat", "-s", "7", "-o", "a.png"]) == 0
    capsys.readouterr()
    assert cli.main(["redraw", "a.png", "-o", "b.png"]) == 0
    assert capsys.readouterr().out == "equal: every pixel\n"
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert np.array_equal(a, b)
        changed = a.copy()
    changed.putpixel((3, 2), (0, 0, 0))
    save_png(changed, Path("a.png"), read_request("a.png"))
    assert cli.main(["redraw", "a.png"]) == 1
    told = capsys.readouterr()
    assert "different: 1 of 384 pixels" in told.out
    assert "note" not in told.err
    fake.model_hash = "another"
    cli.main(["redraw", "a.png"])
    assert (
        "was drawn by fake (0123456789), not fake (another); give its model by --model"
        in capsys.readouterr().err
    )


def test_redraw_of_a_picture_without_a_request(fake, capsys):
    Image.new("RGB", (8, 8)).save("a.png")
    assert cli.main(["redraw", "a.png"]) == 2
    assert "does not say how it was drawn" in capsys.readouterr().err


def test_the_png_holds_the_whole_request_and_redraws(tiny, tiny_folder, capsys):
    assert cli.txt2img([*tiny, "-s", "9", "--sampler", "euler_a", "-o", "a.png", "-n", "sea"]) == 0
    request = read_request("a.png")
    assert request.model == "tiny"
    drawn = (
        request.prompt,
        request.negative_prompt,
        request.seeds,
        request.num_inference_steps,
        request.sampler,
    )
    assert drawn == ("the red boat", "sea", (9,), 3, "euler_a")
    assert None not in (request.height, request.width, request.guidance_scale)
    with Image.open("a.png") as image:
        assert image.size == (request.width, request.height)
        assert image.text["parameters"].startswith(
            "the red boat\nNegative prompt: sea\nSteps: 3, Sampler: Euler a, "
        )
    capsys.readouterr()
    assert cli.main(["redraw", "a.png", "-m", str(tiny_folder), "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out == "equal: every pixel\n"
    save_png(Image.open("a.png"), Path("a.png"), request.replace(seeds=(10,)))
    assert cli.main(["redraw", "a.png", "-m", str(tiny_folder), "--dtype", "fp32"]) == 1
    assert "different: " in capsys.readouterr().out
