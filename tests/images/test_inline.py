"""Escape sequences of pictures decode back to the picture; which terminal takes which."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ldm.images.inline import inline, iterm2, kitty, protocol, sixel


def noise(width=150, height=100):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def few_colours(width=37, height=23):
    colours = np.array([[0, 0, 0], [255, 0, 0], [51, 102, 153], [255, 255, 255]], dtype=np.uint8)
    return Image.fromarray(colours[np.random.default_rng(1).integers(0, 4, (height, width))])


def from_png(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))


@pytest.mark.parametrize("number", [0, 77])
def test_kitty(number):
    sequence = kitty(noise(), number)
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sequence)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in chunks) == sequence
    assert all(len(data) <= 4096 for _, data in chunks)
    assert all(len(data) % 4 == 0 for _, data in chunks)
    keys = [dict(key.split("=") for key in each.split(",")) for each, _ in chunks]
    assert [each["m"] for each in keys] == ["1"] * (len(chunks) - 1) + ["0"]
    assert keys[0].items() >= {"a": "T", "f": "100", "q": "2", "C": "1"}.items()
    assert keys[0].get("i") == (str(number) if number else None)
    assert len(chunks) > 3
    assert np.array_equal(from_png("".join(data for _, data in chunks)), noise())


def test_iterm2():
    found = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\a]*)\a", iterm2(noise()))
    keys = dict(key.split("=") for key in found[1].split(";"))
    assert keys == {
        "inline": "1",
        "size": str(len(base64.b64decode(found[2]))),
        "width": "150px",
        "height": "100px",
    }
    assert np.array_equal(from_png(found[2]), noise())


def decode_sixel(sequence):
    """A decoder written from DEC's description, one character after another."""
    width, height, body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\', sequence, re.DOTALL).groups()
    image = np.full((int(height), int(width), 3), -1)
    palette, colour, x, top = {}, None, 0, 0
    for token in re.finditer(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)(.)|([$-])|(.)", body):
        if token[1]:
            colour = int(token[1])
            if token[2]:
                palette[colour] = [round(int(level) * 255 / 100) for level in token.group(2, 3, 4)]
        elif token[7] == "$":
            x = 0
        elif token[7] == "-":
            x, top = 0, top + 6
        else:
            bits, count = ord(token[6] or token[8]) - 63, int(token[5] or 1)
            assert 0 <= bits < 64
            for row in range(6):
                if bits >> row & 1:
                    assert (image[top + row, x : x + count] == -1).all()  # no pixel is painted twice
                    image[top + row, x : x + count] = palette[colour]
            x += count
    return image


@pytest.mark.parametrize("size", [(37, 23), (6, 6), (1, 1), (64, 13)])
def test_sixel(size):
    image = few_colours(*size)
    assert np.abs(decode_sixel(sixel(image)) - np.asarray(image, int)).max() <= 1  # percent, rounded


def test_sixel_of_more_colours_than_it_has():
    ramp = Image.fromarray(np.indices((64, 64, 3)).sum(0).astype(np.uint8) * 2)
    difference = np.abs(decode_sixel(sixel(ramp)) - np.asarray(ramp, int))
    assert difference.max() <= 16
    assert sixel(Image.new("RGB", (400, 6), "red")).count("~") == 1  # a run


@pytest.mark.parametrize(
    ("env", "way"),
    [
        ({}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
    ],
)
def test_which_terminal_takes_which(env, way):
    assert protocol(env) == way
    if way is not None:
        assert inline(few_colours(), way).startswith("\x1b")
