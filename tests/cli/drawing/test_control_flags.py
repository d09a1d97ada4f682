"""`--control`: its fields, and whose files are opened for a picture's word."""

import argparse

import pytest

from ldm.cli.drawing.control_flags import control


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
