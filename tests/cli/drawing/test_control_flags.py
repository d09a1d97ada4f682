"""`--control`: its fields, and whose files are opened for a picture's word."""

import argparse
from pathlib import Path

import pytest

from ldm.cli.drawing.control_flags import check_local, control
from ldm.errors import UserError
from ldm.request import Request


def test_fields_are_read_and_commas_in_names_kept():
    text = "nets/canny, v2.safetensors,image=a,b.png,scale=0.8, end=0.6,mode=prompt,preprocess=canny:low=50"
    assert control(text) == {
        "model": "nets/canny, v2.safetensors",
        "image": "a,b.png",
        "scale": 0.8,
        "end": 0.6,
        "mode": "prompt",
        "preprocess": "canny:low=50",
    }
    assert control("net") == {"model": "net"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net,strength=1", "is none of image, scale"),
        ("net,scale=much", "scale=much is no number"),
        ("net,scale=1,scale=2", "scale is given twice"),
        ("image=a.png", "begins with no name or file"),
        (",image=a.png", "begins with no name or file"),
    ],
)
def test_what_is_wrong_is_told(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        control(text)


@pytest.mark.parametrize("name", ["owner/model", "//host/share/net.safetensors", "\\\\host\\share\\net"])
def test_nothing_is_fetched_for_a_pictures_word(tmp_path, name):
    (tmp_path / "a.png").write_bytes(b"")
    use = {"model": name, "image": str(tmp_path / "a.png")}
    for request in (Request(control=[use]), Request(hires=Request(control=[use]))):
        with pytest.raises(UserError, match="does not lie here, and is not fetched for a picture's word"):
            check_local(request, Path("stranger.png"))
    check_local(Request(control=[use | {"model": str(tmp_path)}]), Path("own.png"))
