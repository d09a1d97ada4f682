"""Names by patterns: what they hold, and that every system takes them."""

import os
from datetime import datetime

import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.images.names import Pattern
from ldm.images.png import save_new, save_numbered
from ldm.request import Request

NOW = datetime(2026, 1, 2, 3, 4, 5)
REQUEST = Request(
    prompt="a red boat", seeds=(7,), num_inference_steps=4, guidance_scale=2.5, sampler="DPM++ 2M Karras"
)
WINDOWS = set('<>:"/\\|?*') | {chr(c) for c in range(32)}
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{n}" for d in ("COM", "LPT") for n in "123456789¹²³")}
NASTY = [
    "".join(map(chr, range(1, 256))),
    'a <b>: "c"/d\\e|f?*',
    "../../etc/passwd",
    "..",
    "...",
    "   ",
    ".hidden",
    "-rf *",
    "ends with dots...",
    "ends with spaces   ",
    "CON",
    "nul",
    "com1.boat",
    "LPT¹",
    "aux .txt",
    "\u202egnp.exe",
    "\x1b[2J\x9b1m",
    "橋" * 500,
    "e\u0301" * 300,
    "⛵\U0001f600" * 100,
    "100%05d %s",
    "$HOME `ls` ; rm",
    "two\nlines\r\n\u2028more",
    "",
]


@pytest.mark.parametrize(
    ("pattern", "name", "like"),
    [
        ("{seed}-{prompt:40}", "7-a red boat", "*-*"),
        ("{prompt:5}", "a red", "*"),
        ("{counter}-{seed:04}", "%05d-0007", "%05d-*"),
        ("{counter:3}", "%03d", "%03d"),
        ("{date}_{time}", "2026-01-02_03-04-05", "*_*"),
        ("{date:%Y/%m}-{steps}-{cfg}", "2026-01-4-2.5", "*-*-*"),
        ("{sampler}/{spacing}/{cfg_scale:.1f}", "dpmpp_2m/karras/2.5", "*"),
        ("{{{seed}}}", "{7}", "{*}"),
        ("{width}x", "x", "*x"),
    ],
)
def test_names_are_exactly_these(pattern, name, like):
    assert Pattern(pattern).fill(REQUEST, NOW) == (name, like)


@pytest.mark.parametrize("prompt", NASTY)
@pytest.mark.parametrize(
    "pattern", ["{prompt}", "{prompt}-{prompt}", "x{seed}-{prompt:300}", "{model}/{prompt}"]
)
def test_every_system_takes_them(tmp_path, pattern, prompt):
    request = REQUEST.replace(prompt=prompt, model="owner/name")
    path, _ = Pattern(pattern).fill(request, NOW)
    *_, name = path.split("/")
    assert len(path.split("/")) == 1 + pattern.count("/")
    assert name
    assert not set(name) & WINDOWS
    assert name.isprintable()
    assert name.rstrip(". ") == name
    assert not name.startswith((".", "-", " "))
    assert name.upper().partition(".")[0].rstrip() not in DEVICES
    assert len(name.encode()) <= 240
    files = [save_new(Image.new("RGB", (8, 8)), tmp_path / f"{path}.png", request) for _ in range(2)]
    assert files[0] != files[1]
    assert all(file.resolve().is_relative_to(tmp_path) for file in files)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{sed}", "did you mean seed"),
        ("{prompt.__class__}", "unknown field"),
        ("{0}", "unknown field"),
        ("{}", "unknown field"),
        ("{", "stand for braces themselves"),
        ("{counter}{counter}", "the counter once"),
        ("{counter}/{seed}", "in the name itself"),
        ("{counter:x}", "counter:05"),
        ("{seed:x y}", "cannot be written as"),
        ("{prompt:long}", "cannot be written as"),
        ("", "is no name"),
        ("/", "is no name"),
        ("a/", "is no name"),
        ("x" * 100, "is no name"),
    ],
)
def test_patterns_that_cannot_be_followed(pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        Pattern(pattern)
    assert "\n" not in str(caught.value)


def test_a_counter_goes_on_whatever_else_is_in_the_names(tmp_path):
    pattern, image = Pattern("{counter:3}-{prompt}"), Image.new("RGB", (8, 8))
    (tmp_path / "041-of another day.jpg").touch()
    (tmp_path / "900.png").touch()  # of another pattern
    for prompt in ("a boat", "a sea"):
        name, like = pattern.fill(REQUEST.replace(prompt=prompt), NOW)
        save_numbered(image, tmp_path, f"{name}.png", like=f"{like}.*")
    assert sorted(os.listdir(tmp_path))[1:] == ["042-a boat.png", "043-a sea.png", "900.png"]


def test_a_name_that_is_taken_is_not_overwritten(tmp_path):
    (tmp_path / "a.png").write_text("mine")
    names = [save_new(Image.new("RGB", (8, 8)), tmp_path / "a.png").name for _ in range(3)]
    assert names == ["a-2.png", "a-3.png", "a-4.png"]
    assert (tmp_path / "a.png").read_text() == "mine"
