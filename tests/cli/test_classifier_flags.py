"""--classifier: from flags into the PNG, and from there the same picture again."""

import pytest
from PIL import Image
from tiny_classifier import save_classifier

import ldm
from ldm import cli
from ldm.images.png import read_request


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    vae = ldm.load(tiny_folder, device="cpu", dtype="fp32").vae
    return save_classifier(tmp_path_factory.mktemp("classifiers") / "tiny", vae)


def test_a_picture_led_by_a_classifier_is_drawn_again_to_the_pixel(tiny, folder, tmp_path, capsys):
    guided = [*tiny, "--classifier", str(folder), "--classifier-class", "duck", "--classifier-scale", "40"]
    assert cli.txt2img([*guided, "-p", "", "-o", "a.png"]) == 0
    request = read_request("a.png")
    assert (request.prompt, request.classifier_class, request.classifier_scale) == ("", "duck", 40.0)
    assert cli.txt2img([*tiny, "-p", "", "-o", "plain.png"]) == 0
    assert Image.open("plain.png").tobytes() != Image.open("a.png").tobytes()
    capsys.readouterr()
    again = ["redraw", "a.png", *tiny[2:4], "--dtype", "fp32", "--quiet"]
    assert cli.main([*again, "--classifier", str(folder)]) == 0
    assert capsys.readouterr().out == "equal: every pixel\n"
    other = save_classifier(tmp_path / "other", ldm.load(tiny[3], device="cpu").vae, seed=1)
    for flags, said in (
        ([], "classifier_class duck is not allowed here: give the classifier that knows it"),
        (["--classifier", str(other)], "other is not the classifier that this picture was drawn with"),
    ):
        assert cli.main([*again, *flags]) == 2
        out = capsys.readouterr()
        assert said in out.err
        assert out.err.startswith("ldm: ")
        assert out.err.count("\n") == 1


def test_a_classifier_without_a_class_would_do_nothing_and_is_said(tiny, folder, capsys):
    assert cli.txt2img([*tiny, "--classifier", str(folder)]) == 2
    assert "--classifier leads to a class: give --classifier-class" in capsys.readouterr().err
