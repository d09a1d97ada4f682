"""Pictures enlarged by a second model: in one command what two commands draw, and redrawn from the PNG."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_folder
from tiny_upscaler import upscaler_parts

import ldm
from ldm import cli
from ldm.checkpoint import save_folder
from ldm.cli.drawing.draw import check_batch
from ldm.images.png import read_request

MODEL = ("-m", "base", "--device", "cpu", "--dtype", "fp32", "--quiet")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_folder(root / "base")
    save_folder(root / "upscaler", upscaler_parts(root / "tokenizer"))
    return root


@pytest.fixture(autouse=True)
def _in_place(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def pipe(root):
    return ldm.load(root / "base", device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def both(pipe, root):
    return pipe.with_upscaler(root / "upscaler")


def pixels(name):
    return np.asarray(Image.open(name))


def test_one_command_draws_what_two_draw():
    asked = ["-p", "a boat", "--steps", "2", "-s", "5"]
    assert cli.txt2img([*MODEL, *asked, "-o", "large.png", "--upscaler", "upscaler"]) == 0
    assert cli.txt2img([*MODEL, *asked, "-o", "small.png"]) == 0
    second = ["-m", "upscaler", *MODEL[2:], "-p", "a boat", "-s", "5", "-i", "small.png", "-o", "again.png"]
    assert cli.txt2img(second) == 0
    assert pixels("large.png").shape[0] == 2 * pixels("small.png").shape[0]
    assert np.array_equal(pixels("large.png"), pixels("again.png"))


def test_an_edit_is_enlarged_as_what_it_became(both, monkeypatch):
    from ldm.pipeline import sample

    asked, prepare = [], sample.prepare

    def noted(model, request, inputs):
        asked.append(request.prompt)
        return prepare(model, request, inputs)

    monkeypatch.setattr(sample, "prepare", noted)
    photo = Image.new("RGB", (16, 16), "red")
    (large,) = both("sea", image=photo, target_prompt="a boat", num_inference_steps=3).images
    assert asked == ["a boat"]
    assert large.size == (32, 32)


def test_the_png_tells_how_it_was_enlarged_and_redraws(root, capsys):
    cli.txt2img([*MODEL, "-p", "a boat", "--steps", "2", "-o", "large.png", "--upscaler", "upscaler"])
    enlarged = read_request("large.png").upscaling
    assert (enlarged.model, len(enlarged.model_hash)) == ("upscaler", 10)
    assert (enlarged.num_inference_steps, enlarged.guidance_scale, enlarged.noise_level) == (2, 1.0, 0)
    assert (enlarged.height, enlarged.width) == Image.open("large.png").size[::-1]
    assert "Hires upscaler: upscaler" in Image.open("large.png").text["parameters"]
    again = ["redraw", "large.png", *MODEL]
    assert cli.main([*again, "--upscaler", "upscaler"]) == 0
    told = capsys.readouterr()
    assert "equal: every pixel" in told.out
    assert "note" not in told.err
    assert cli.main(again) == 2
    assert f"large.png was enlarged by upscaler ({enlarged.model_hash}); give its" in capsys.readouterr().err


def test_defaults_that_changed_do_not_change_a_redrawn_picture(root, capsys):
    cli.txt2img([*MODEL, "-p", "a boat", "--steps", "2", "-o", "old.png", "--upscaler", "upscaler"])
    shutil.copytree(root / "upscaler", root / "changed")
    (root / "changed" / "ldm.json").write_text('{"num_inference_steps": 5, "noise_level": 20}')
    assert cli.main(["redraw", "old.png", *MODEL, "--upscaler", "changed"]) == 0


def test_another_upscaler_is_told(root, both, capsys):
    cli.txt2img([*MODEL, "-p", "a boat", "--steps", "2", "-o", "old.png", "--upscaler", "upscaler"])
    capsys.readouterr()
    unet = both.upscaler.unet
    with torch.no_grad():
        unet.conv_out.weight.neg_()
        both.upscaler.save(root / "other")
        unet.conv_out.weight.neg_()
    assert cli.main(["redraw", "old.png", *MODEL, "--upscaler", "other"]) == 1
    told = capsys.readouterr().err
    assert "was enlarged by upscaler (" in told
    assert "not other (" in told


def test_each_picture_of_a_call_is_enlarged_with_its_own_prompt_and_seed(pipe, both):
    prompts = ["sea", "a boat"]
    made = both(prompts, seed=3, num_images_per_prompt=2, num_inference_steps=2, output_type="pt")
    small = pipe(prompts, seed=3, num_images_per_prompt=2, num_inference_steps=2).images
    assert [request.upscaling.model for request in made.requests] == ["upscaler"] * 2
    seeds = [seed for request in made.requests for seed in request.seeds]
    texts = [request.prompt for request in made.requests for _ in request.seeds]
    for image, before, prompt, seed in zip(made.images, small, texts, seeds, strict=True):
        (alone,) = both.upscaler(prompt, image=before, seed=seed, output_type="pt").images
        assert torch.equal(image, alone)


def test_latents_are_not_enlarged(pipe, both):
    asked = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    small = both("sea", **asked)
    assert torch.equal(pipe("sea", **asked).images, small.images)
    assert small.request.upscaling is None


def test_a_request_says_how_to_enlarge(pipe, both):
    request = ldm.Request(num_inference_steps=2, upscaling=ldm.Request(num_inference_steps=1, noise_level=9))
    made = both.generate(request)
    (small,) = pipe.generate(request.replace(upscaling=None)).images
    (expected,) = both.upscaler("", image=small, seed=0, num_inference_steps=1, noise_level=9).images
    assert np.array_equal(np.asarray(made.images[0]), np.asarray(expected))
    with pytest.raises(ldm.UserError, match="upscaling is not allowed here: give an upscaler"):
        pipe.generate(request)


def test_sizes_that_would_be_too_large_are_told_before_drawing(both, pipe):
    with pytest.raises(ldm.UserError, match=r"4096x2056 pixels .* 2 times as large: .* at most 2048"):
        both("sea", height=2056, width=4096)
    small, large = (each.resolve(ldm.Request(height=2048, width=2048)) for each in (pipe, both))
    check_batch(small, 16)
    with pytest.raises(ldm.UserError, match=r"16 pictures of 4096x4096 .* at most 4"):
        check_batch(large, 16)


def test_what_is_no_upscaler_is_refused(pipe, capsys):
    with pytest.raises(ldm.UserError, match="base is no upscaler"):
        pipe.with_upscaler(pipe)
    assert cli.txt2img([*MODEL, "-p", "sea", "-o", "no.png", "--upscaler", "base"]) == 2
    assert "base is no upscaler" in capsys.readouterr().err
    assert cli.txt2img([*MODEL, "-p", "sea", "-o", "no.png", "--upscaler", "nowhere"]) == 2
    assert "nowhere: no such folder or file" in capsys.readouterr().err
