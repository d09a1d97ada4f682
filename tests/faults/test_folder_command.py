"""`ldm folder`: the report of a folder to train on, with something wrong of everything in it."""

import hashlib
import json
import os

import pytest
from broken_pictures import HALF, JPEG, encoded, exif, huge_png, make_folder, scene
from PIL import Image

from ldm.cli import main


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture
def zoo(folder):
    """Something of everything."""
    for name, data in {
        "half.jpg": JPEG[:999],
        "page.jpg": b"<html>",
        "rgba.png": encoded(HALF, "PNG"),
        "bomb.png": huge_png(60_000),
        "turned.jpg": encoded(scene(8), "JPEG", exif=exif(6)),
    }.items():
        (folder / name).write_bytes(data)
    (folder / "same.png").write_bytes((folder / "good.png").read_bytes())
    for i in range(25):
        scene(100 + i).save(folder / f"more{i:02}.png")
    (folder / "good.txt").write_text("a good picture")
    (folder / "same.txt").write_text("a good picture")
    return folder


def tree(folder):
    """Everything about a folder that a program could have changed."""
    found = [(path, path.lstat()) for path in sorted([folder, *folder.rglob("*")])]
    return [
        (
            path,
            stat.st_mode,
            stat.st_mtime_ns,
            path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path, stat in found
    ]


def test_the_report_names_everything_and_changes_nothing(zoo, tmp_path, capsys):
    before = tree(zoo)
    sheet = tmp_path / "sheet.png"
    assert main(["folder", str(zoo), "--resolution", "64", "--sheet", str(sheet), "-q"]) == 2
    out = capsys.readouterr().out
    assert tree(zoo) == before
    assert "stops training\n  missing caption (27)\n    more00.png: it has no caption: training stops" in out
    assert "and 7 more" in out
    assert "skipped\n  duplicate (1)\n    same.png: the same bytes as" in out
    for line in ("half.jpg: cut short", "page.jpg: its content is no picture but a web page", "bomb.png: "):
        assert f"    {line}" in out
    assert "fixed when loaded\n  EXIF-rotated (1)\n    turned.jpg: " in out
    assert out.endswith("training could not start: mend what stops it\n")
    assert Image.open(sheet).size[0] == 6 + 8 * 166


def test_every_line_can_be_shown(zoo, capsys):
    arguments = ["folder", str(zoo), "--missing_caption", "skip", "--resolution", "64"]
    assert main([*arguments, "--all"]) == 0
    out = capsys.readouterr().out
    assert "more24.png: it has no caption: it is skipped" in out
    assert out.endswith("training could start: 1 picture in each epoch\n")
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["can_train"] is True
    assert printed["examples"] == [
        {
            "path": str(zoo / "good.png"),
            "caption": "a good picture",
            "size": [72, 96],
            "digest": hashlib.sha256((zoo / "good.png").read_bytes()).hexdigest(),
            "repeats": 1,
        }
    ]
    assert {"path", "kind", "text", "effect"} == printed["findings"][0].keys()


@pytest.mark.skipif(os.name == "nt", reason="such a name cannot be given there")
def test_names_cannot_write_to_the_terminal(folder, capsys):
    os.rename(folder / "good.png", os.fsencode(folder) + b"/\x1b[2J\xff.png")
    assert main(["folder", str(folder), "--all"]) == 2
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2J\udcff.png: it has no caption" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a folder"),
        ([".", "--sheet", "mine/sheet.png"], "lies in the folder itself"),
        (["mine", "--sheet", "sheet.jpg"], "must name a .png file"),
        (["mine", "--sheet", "sheet.png", "--resolution", "100"], "not a multiple of 8"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(folder.parent)
    before = tree(folder.parent)
    assert main(["folder", *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert tree(folder.parent) == before
