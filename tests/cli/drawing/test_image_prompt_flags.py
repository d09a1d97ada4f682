"""--image-prompt, from the command line to a PNG and back."""

import argparse
import json
from pathlib import Path

import pytest
from family_inputs import mask, picture
from tiny_families import make_family
from tiny_image_prompts import make_adapter, make_encoder

from ldm import cli
from ldm.cli.drawing.image_prompt_flags import image_prompt
from ldm.images.png import read_request

MODEL = ["-m", "model", "--dtype", "fp32", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("image_prompts")
    peer = make_family("sd1", root / "model")
    make_encoder(root / "image_encoder")
    make_adapter(peer.unet, root / "plain.bin")
    picture().save(root / "ref.png")
    mask().save(root / "mask.png")
    return root


def txt2img(output, *flags):
    common = ["-p", "sea", "--steps", "2", "-W", "16", "-H", "16", "-o", str(output)]
    return cli.main(["txt2img", *common, *MODEL, *flags])


def test_drawn_and_drawn_again(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    one = tmp_path / "one.png"
    assert txt2img(one, "--image-prompt", "plain.bin,image=ref.png,scale=0.6,mask=mask.png") == 0
    (use,) = read_request(one).image_prompts
    assert (use.adapter, use.images, use.masks, use.scale) == ("plain.bin", ("ref.png",), ("mask.png",), 0.6)
    assert txt2img(tmp_path / "none.png") == 0
    assert one.read_bytes() != (tmp_path / "none.png").read_bytes()
    assert cli.main(["redraw", str(one), *MODEL]) == 0
    assert "equal" in capsys.readouterr().out
    # Files that were moved are given again; a changed one is told of, and so is one that is not here.
    moved = tmp_path / "moved.png"
    moved.write_bytes(Path("ref.png").read_bytes())
    again = ["redraw", str(one), *MODEL, "--image-prompt"]
    assert cli.main([*again, f"plain.bin,image={moved},mask=mask.png"]) == 0
    picture(seed=9).save(moved)
    assert cli.main([*again, f"plain.bin,image={moved},mask=mask.png"]) == 2
    monkeypatch.chdir(tmp_path)
    model = ["-m", str(place / "model"), "--dtype", "fp32", "-q"]
    assert cli.main(["redraw", str(one), *model]) == 2
    assert cli.main(["txt2img", "--from-png", str(one), *model, "-o", "new.png"]) == 2
    said = capsys.readouterr().err
    assert "has changed" in said
    assert (
        "names 'plain.bin' (image_prompts), which is not here, and nothing is fetched for a picture's word"
        in said
    )
    assert said.count("which is not here") == 2


def test_from_a_line_of_json(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    use = {"adapter": "plain.bin", "images": "ref.png", "scale": {"mid": 1}}
    line = json.dumps({"prompt": "sea", "image_prompts": [use]})
    (tmp_path / "lines.txt").write_text(line, encoding="utf-8")
    flags = ["--from-file", str(tmp_path / "lines.txt"), "--steps", "2", "-W", "16", "-H", "16"]
    assert cli.main(["txt2img", *flags, *MODEL, "-o", str(tmp_path / "a.png")]) == 0
    assert read_request(tmp_path / "a.png").image_prompts[0].scale == (("mid", (1.0,)),)


def test_what_a_flag_says():
    pictures = "image=a, b.png,image=c.png"
    assert image_prompt(f"owner/name,weight_name=a/b.bin,{pictures},up.block_0=0/1/0,mid=0.5") == {
        "adapter": "owner/name",
        "weight_name": "a/b.bin",
        "images": ["a, b.png", "c.png"],
        "masks": [],
        "scale": {"up.block_0": [0.0, 1.0, 0.0], "mid": [0.5]},
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image=a.png", "begins with no name"),
        ("a.bin", "has no picture"),
        ("a.bin,image=b.png,scales=1", "scales in .* is none of image, scale, mask"),
        ("a.bin,image=b.png,scale=x", "scale=x is not allowed: give a number"),
        ("a.bin,image=b.png,scale=1/2", "give a number"),
        ("a.bin,image=b.png,up=x", "numbers such as"),
        ("a.bin,image=b.png,up=1,scale=1", "give one of them"),
        ("a.bin,image=", "image= in .* has no value"),
    ],
)
def test_what_a_flag_cannot_say(text, says):
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        image_prompt(text)
