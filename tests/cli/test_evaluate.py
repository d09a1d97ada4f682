"""`ldm evaluate` from flags to files, and one line about whatever is wrong with what it is given."""

import json
import shutil

import pytest
from broken_pictures import scene
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import make_clip, make_tower

from ldm.cli import main
from ldm.postcards.scoring.prompts import evaluation_prompts


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A whole CLIP, and an image tower alone."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "whole")
    make_tower(folder / "tower")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two folders of pictures and a working folder."""
    monkeypatch.chdir(tmp_path)
    for folder, seeds in (("mine", range(6)), ("real", range(50, 57))):
        (tmp_path / folder).mkdir()
        for k, seed in enumerate(seeds):
            scene(seed, (40, 40)).save(tmp_path / folder / f"{k}.png")
            (tmp_path / folder / f"{k}.txt").write_text("the red boat" if k % 2 else "a sea")
    return tmp_path


def run(*argv):
    return main(["evaluate", *map(str, argv)])


def test_two_folders_a_clip_and_a_model(here, clips, tiny_folder, capsys):
    argv = ["mine", "--reference", "real", "--clip", clips / "whole", "-m", tiny_folder, "--dtype", "fp32"]
    assert run(*argv, "--out", "out") == 0
    out = capsys.readouterr().out
    found = json.loads((here / "out" / "evaluate.json").read_text())
    names = ["FID", "KID", "CMMD x 1000", "precision", "recall", "CLIP score", "own caption is nearest"]
    names += ["PSNR of the VAE, dB", "SSIM of the VAE", "rFID of the VAE"]
    assert list(found["figures"]) == names
    for name, figure in found["figures"].items():
        assert f"{figure['value']:.4g}" in next(line for line in out.splitlines() if line.startswith(name))
    assert found["left_out"].keys() == {"prompt following"}
    assert f"left out: prompt following: {found['left_out']['prompt following']}" in out
    protocol = found["protocol"]
    assert (protocol["pictures"]["count"], protocol["reference"]["count"], protocol["seed"]) == (6, 7, 0)
    assert protocol["clip"] == protocol["features"]
    assert {"ldm", "torch", "torchmetrics", "transformers"} <= protocol["versions"].keys()
    assert set(found["per_picture"]["PSNR of the VAE, dB"]) == {f"{k}.png" for k in range(7)}
    page = (here / "out" / "evaluate.html").read_text()
    assert page.count("<svg") == 4  # shares, and three of pictures
    assert "<script" not in page


def test_pictures_are_drawn_first(here, tiny_folder, clips):
    (here / "prompts.txt").write_text("the red boat\na sea\n")
    argv = ["--prompts", "prompts.txt", "-n", 3, "-s", 7, "--steps", 2, "-m", tiny_folder, "--dtype", "fp32"]
    assert run(*argv, "--clip", clips / "whole", "--out", "out", "--reference", "real", "-q") == 0
    drawn = sorted((here / "out" / "drawn").iterdir())
    alone = here / "alone.png"
    same = ["-p", "the red boat", "-s", "9", "--steps", "2", "-m", str(tiny_folder), "--dtype", "fp32"]
    assert main(["txt2img", *same, "-o", str(alone), "-q"]) == 0
    with Image.open(alone) as one, Image.open(drawn[2]) as other:  # the third: prompts in turn, seeds from 7
        assert one.tobytes() == other.tobytes()
    found = json.loads((here / "out" / "evaluate.json").read_text())
    assert found["figures"]["CLIP score"]["counts"] == {"with captions": 3}
    assert found["figures"]["FID"]["counts"] == {"measured": 3, "reference": 7}
    how = found["protocol"]["drawn"]
    assert (how["prompts"], how["first_seed"], how["num_inference_steps"]) == ("prompts.txt", 7, 2)
    assert how["model"] == tiny_folder.name
    assert run(*argv, "--out", "out") == 2  # nothing is drawn over


def test_the_world_s_own_prompts_are_scored(here, tiny_folder, capsys):
    argv = ["--prompts", "postcard", "--reference", "postcard", "-n", 4, "--steps", 1, "-m", tiny_folder]
    assert run(*argv, "--dtype", "fp32", "--out", "out") == 0
    found = json.loads((here / "out" / "evaluate.json").read_text())
    said = sum(prompt.place is not None for prompt in evaluation_prompts(4))
    assert found["figures"]["place"]["counts"] == {"that say it": said}
    assert found["protocol"]["reference"]["count"] == 4
    assert "postcards only" in found["figures"]["FID"]["notes"][0]
    assert "CLIP score" in found["left_out"]
    capsys.readouterr()


def nothing(here):
    (here / "none").mkdir()


def unreadable(here):
    nothing(here)
    (here / "none" / "a.png").write_bytes(b"<html>")


def one(here):
    nothing(here)
    scene(1).save(here / "none" / "a.png")


def broken_table(here):
    one(here)
    (here / "none" / "metadata.jsonl").write_text("{\n")


def nan_tower(here):
    make_tower(here / "none")
    tensors = load_file(here / "none" / "model.safetensors")
    tensors["visual_projection.weight"].fill_(float("nan"))
    save_file(tensors, here / "none" / "model.safetensors", {"format": "pt"})


def no_change(here):
    """What is wrong is in the flags."""


@pytest.mark.parametrize(
    ("prepare", "argv", "match"),
    [
        (no_change, "", "give PICTURES, a folder that is measured, or else --prompts"),
        (no_change, "mine --prompts postcard", "give PICTURES"),
        (no_change, "mine --steps 3", "--steps is for drawing: give --prompts"),
        (no_change, "mine --reference postcard", "--reference postcard is for pictures that --prompts draws"),
        (no_change, "missing", "missing is not a folder"),
        (no_change, "mine --reference missing", "missing is not a folder"),
        (no_change, "mine --reference mine", "--reference mine is the folder that is measured"),
        (no_change, "--prompts missing.txt", "cannot read prompts from missing.txt"),
        (no_change, "mine --features missing", "missing is no CLIP folder"),
        (no_change, "mine --features real", "real is no CLIP folder: it has no config.json"),
        (no_change, "mine --clip TOWER", "has an image tower only: give it by --features"),
        (no_change, "mine -m missing", "missing"),
        (nothing, "none", "none holds no picture that can be read"),
        (unreadable, "none", "none holds no picture that can be read: none/a.png: its content is no picture"),
        (one, "none --reference real", "none holds 1 picture"),
        (one, "mine --reference none", "none holds 1 picture"),
        (broken_table, "none", "none/metadata.jsonl: "),
        (nan_tower, "mine --reference real --features none", "none gives NaN or Inf for"),
    ],
)
def test_mistakes_are_one_line(here, clips, capsys, prepare, argv, match):
    prepare(here)
    capsys.readouterr()
    words = [str(clips / "tower") if word == "TOWER" else word for word in argv.split()]
    assert run(*words, "--out", "out", "-q") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("ldm: ")
    assert match in lines[-1]
    assert all(line.startswith("left out: ") for line in lines[:-1])
    assert not (here / "out" / "evaluate.json").exists()


def test_a_model_without_an_encoder(here, tiny_folder, capsys):
    shutil.copytree(tiny_folder, here / "model")
    (weights,) = (here / "model" / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: x for name, x in tensors.items() if not name.startswith("encoder.")}, weights)
    assert run("mine", "-m", "model", "-q") == 2
    assert "tensors missing: encoder." in capsys.readouterr().err.splitlines()[0]


def test_what_is_left_out_of_a_folder_is_said(here, capsys):
    (here / "mine" / "broken.png").write_bytes(b"<html>")
    Image.new("RGBA", (20, 30), (0, 0, 0, 0)).save(here / "mine" / "clear.png")
    assert run("mine", "--reference", "real", "--out", "out") == 0
    assert "left out: mine/broken.png: its content is no picture" in capsys.readouterr().err
    pictures = json.loads((here / "out" / "evaluate.json").read_text())["protocol"]["pictures"]
    assert pictures["count"] == 7
    assert pictures["sizes"] == {"40x40": 6, "20x30": 1}
    assert pictures["converted"] == {"alpha": 1}
