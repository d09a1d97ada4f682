"""Real broken files of every kind in a folder to train on: each is named, none crashes, none is changed."""

import hashlib
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.cli import main
from ldm.dataset.examine import examine
from ldm.images.opening import open_picture


def scene(seed, size=(96, 72), mode="RGB"):
    """Smooth, and unlike that of any other seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, len(mode)), dtype=np.uint8)
    return Image.fromarray(small, mode if mode == "CMYK" else None).resize(size, Image.Resampling.BILINEAR)


def encoded(image, form, **values):
    data = io.BytesIO()
    image.save(data, form, **values)
    return data.getvalue()


def exif(orientation):
    values = Image.Exif()
    values[0x0112] = orientation
    return values


def huge_png(side):
    """A PNG whose header promises side x side pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def folder(tmp_path):
    """One good picture, and room for a bad one."""
    (tmp_path / "mine").mkdir()
    scene(0).save(tmp_path / "mine" / "good.png")
    return tmp_path / "mine"


def look(folder, **values):
    return examine(folder, **{"resolution": 64, "missing_caption": "empty"} | values)


def told(folder, **values):
    """(effect, kind, file) of all findings but those of missing captions."""
    return [
        (found.effect, found.kind, found.path and found.path.relative_to(folder).as_posix())
        for found in look(folder, **values).findings
        if found.kind != "missing caption"
    ]


JPEG, PNG = encoded(scene(1), "JPEG", quality=95), encoded(scene(1), "PNG")
WEBP, GIF = encoded(scene(1), "WEBP"), encoded(scene(1), "GIF")


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("half.jpg", JPEG[: len(JPEG) // 2], "truncated"),
        ("end.jpg", JPEG[:-2], "truncated"),
        ("half.png", PNG[: len(PNG) // 2], "truncated"),
        ("flip.png", PNG[:3000] + bytes([PNG[3000] ^ 255]) + PNG[3001:], "truncated"),
        ("half.webp", WEBP[: len(WEBP) // 2], "truncated"),
        ("half.gif", GIF[: len(GIF) // 2], "truncated"),
        ("empty.png", b"", "unreadable"),
        ("page.jpg", b"<!DOCTYPE html><html>404</html>", "not an image"),
        ("noise.webp", bytes(range(256)) * 9, "not an image"),
        ("bomb.png", huge_png(60_000), "too large"),
        ("promise.png", huge_png(5_000), "truncated"),
        ("float.tif", encoded(Image.new("F", (64, 64), 0.5), "TIFF"), "unreadable"),
    ],
)
def test_files_that_cannot_be_trained_on(folder, name, data, kind):
    (folder / name).write_bytes(data)
    examined = look(folder)
    assert told(folder) == [("skipped", kind, name)]
    assert [example.path.name for example in examined.examples] == ["good.png"]
    assert examined.can_train
    with pytest.raises(ldm.UserError, match=name):
        open_picture(folder / name)


def test_a_web_page_is_called_one(folder):
    (folder / "page.jpg").write_text("\n<html>moved</html>")
    texts = [found.text for found in look(folder).findings if found.kind == "not an image"]
    assert texts == ["its content is no picture but a web page: it is skipped"]


def test_nothing_readable_stops(folder):
    (folder / "good.png").write_bytes(b"")
    assert told(folder) == [("stops", "no pictures", None), ("skipped", "unreadable", "good.png")]


def close(image, expected, levels=1.0):
    """Whether two pictures are of one size, and differ by fewer levels on average."""
    return image.size == expected.size and np.abs(np.subtract(image, expected, dtype=float)).mean() < levels


GREY = scene(2).convert("L")
HALF = scene(3)
HALF.putalpha(Image.linear_gradient("L").resize(HALF.size))
ON_WHITE = np.asarray(HALF, dtype=float)
ON_WHITE = ON_WHITE[..., :3] * ON_WHITE[..., 3:] / 255 + 255 - ON_WHITE[..., 3:]
ON_WHITE = Image.fromarray(ON_WHITE.round().astype(np.uint8))
CLEAR = Image.new("P", (96, 72), 1)
CLEAR.putpalette([0, 0, 0, 200, 30, 30])
CLEAR.paste(0, (0, 0, 48, 72))
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
CMYK = scene(4, mode="CMYK")
FRAMES = {"save_all": True, "append_images": [scene(6), scene(7)]}
WHITE_RED = Image.new("RGB", (96, 72), (200, 30, 30))
WHITE_RED.paste("white", (0, 0, 48, 72))


@pytest.mark.parametrize(
    ("name", "data", "kind", "expected"),
    [
        ("cmyk.jpg", encoded(CMYK, "JPEG", quality=98), "CMYK", CMYK.convert("RGB")),
        ("deep.png", encoded(DEEP, "PNG"), "16-bit", GREY.convert("RGB")),
        ("deep.tif", encoded(DEEP, "TIFF"), "16-bit", GREY.convert("RGB")),
        ("rgba.png", encoded(HALF, "PNG"), "alpha", ON_WHITE),
        ("clear.png", encoded(CLEAR, "PNG", transparency=0), "alpha", WHITE_RED),
        (
            "moving.gif",
            encoded(scene(5).quantize(), "GIF", **FRAMES),
            "animated",
            scene(5).quantize().convert("RGB"),
        ),
        ("moving.webp", encoded(scene(5), "WEBP", lossless=True, **FRAMES), "animated", scene(5)),
        ("moving.png", encoded(scene(5), "PNG", **FRAMES), "animated", scene(5)),
    ],
)
def test_files_that_are_fixed_when_loaded(folder, name, data, kind, expected):
    (folder / name).write_bytes(data)
    assert told(folder) == [("fixed", kind, name)]
    opened = open_picture(folder / name)
    assert opened.mode == "RGB"
    assert close(opened, expected, levels=2.0)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_pictures_are_turned_upright(folder, orientation, form):
    """Each orientation against the meaning that the EXIF standard gives it: where row 0 and column 0 lie."""
    upright = scene(8)
    levels = np.asarray(upright)
    # orientation -> whether rows and columns are swapped, then which of the axes run backwards
    swapped, down, across = {
        2: (False, False, True),
        3: (False, True, True),
        4: (False, True, False),
        5: (True, False, False),
        6: (True, True, False),
        7: (True, True, True),
        8: (True, False, True),
    }[orientation]
    stored = levels.transpose(1, 0, 2) if swapped else levels
    stored = stored[:: -1 if down else 1, :: -1 if across else 1]
    values = {"quality": 98} if form == "JPEG" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif(orientation), **values)
    name = f"turned.{form.lower()}"
    (folder / name).write_bytes(data)
    assert close(open_picture(folder / name), upright, levels=2.0)
    (example,) = (example for example in look(folder).examples if example.path.name == name)
    assert example.size == (72, 96)
    if form != "TIFF":  # Pillow turns those by itself
        assert told(folder) == [("fixed", "EXIF-rotated", name)]


def test_a_turned_copy_looks_the_same(folder):
    scene(0).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif(6), quality=95)
    assert ("note", "near duplicate", "turned.jpg") in told(folder)


def test_opaque_pictures_with_an_alpha_channel_are_no_finding(folder):
    scene(9).convert("RGBA").save(folder / "opaque.png")
    assert told(folder) == []


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_costs_no_picture(folder):
    broken = encoded(scene(9), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x00")
    (folder / "odd.jpg").write_bytes(broken)
    assert told(folder) == []
    assert open_picture(folder / "odd.jpg").size == (96, 72)


def test_copies(folder):
    data = (folder / "good.png").read_bytes()
    (folder / "same.png").write_bytes(data)
    (folder / "two.png").write_bytes(data)
    (folder / "two.txt").write_text("another caption")
    scene(0).resize((48, 36)).save(folder / "small.jpg", quality=80)
    assert told(folder) == [
        ("skipped", "duplicate", "same.png"),
        ("note", "duplicate", "two.png"),
        ("note", "near duplicate", "small.jpg"),
    ]
    assert [example.path.name for example in look(folder).examples] == ["good.png", "small.jpg", "two.png"]


def test_plain_pictures_of_other_colours_are_not_alike(folder):
    for i, colour in enumerate(("red", "blue", "white", "black")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{i}.png")
    assert told(folder) == []


def test_tiny_and_extreme(folder):
    scene(1, (40, 31)).save(folder / "tiny.png")
    scene(2, (32, 96)).save(folder / "just.png")
    scene(3, (97, 32)).save(folder / "wide.png")
    assert told(folder) == [("note", "extreme aspect", "wide.png"), ("note", "tiny", "tiny.png")]


def test_links(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    scene(1).save(outside / "x.png")
    try:
        (folder / "out.png").symlink_to(outside / "x.png")
    except OSError:
        pytest.skip("no links here")
    (folder / "folder").symlink_to(outside)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "good.txt").symlink_to(outside / "caption.txt")
    (folder / "again.png").symlink_to(folder / "good.png")
    assert told(folder) == [
        ("skipped", "duplicate", "good.png"),
        *[("skipped", "link", name) for name in ("folder", "gone.png", "good.txt", "loop.png", "out.png")],
    ]


def rows(*pairs):
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in pairs)


def test_rows_and_files_that_do_not_meet(folder, tmp_path):
    scene(1).save(tmp_path / "x.png")
    scene(2).save(folder / "other.png")
    listed = (
        ("good.png", "a"),
        ("../x.png", "b"),
        (str(tmp_path / "x.png"), "c"),
        ("no.png", "d"),
        ("a\0b", "e"),
    )
    more = ("x" * 5000, "f"), ("good.png", "again")
    (folder / "metadata.jsonl").write_text(rows(*listed, *more))
    assert told(folder, missing_caption="error") == [
        ("stops", "file without a row", "other.png"),
        ("skipped", "repeated row", "metadata.jsonl"),
        *[("skipped", "row leaves the folder", "metadata.jsonl")] * 2,
        *[("skipped", "row without a file", "metadata.jsonl")] * 3,
    ]
    texts = [found.text for found in look(folder).findings if found.kind == "row leaves the folder"]
    assert texts[0].startswith("row 2: ../x.png lies outside")


@pytest.mark.parametrize(
    ("name", "data", "kind", "said"),
    [
        ("metadata.jsonl", b'{"file_name": "good.png", "te\n', "broken row", "row 1: it is not JSON"),
        ("metadata.jsonl", b'\n["good.png", "a"]\n', "broken row", "row 2: it must have a file_name"),
        ("metadata.jsonl", b'{"file_name": "good.png"}', "broken table", "no column text, but file_name"),
        ("metadata.jsonl", b'{"file_name": "good.png", "text": ["a"]}', "broken row", "row 1"),
        ("metadata.jsonl", b'{"file_name": 3, "text": "a"}', "broken row", "row 1"),
        ("metadata.jsonl", b'{"file_name": "good.png", "text": "\xe9"}', "broken table", "not UTF-8"),
        ("metadata.csv", b"image,text\ngood.png,a\n", "broken table", "no column file_name, but image, text"),
        ("metadata.csv", b"", "broken table", "no column file_name and no text, but nothing"),
        ("metadata.csv", b"file_name,text\ngood.png,a cat, sitting\n", "broken table", "row 2: it has more"),
        ("metadata.csv", b'file_name,text\ngood.png,"a\n', "broken table", "unexpected end of data"),
        ("metadata.csv", b"file_name,text\ngood.png,\xff\n", "broken table", "not UTF-8"),
    ],
)
def test_broken_tables_stop_the_run(folder, name, data, kind, said):
    (folder / name).write_bytes(data)
    examined = look(folder)
    first = examined.findings[0]
    assert (first.effect, first.kind, first.path) == ("stops", kind, folder / name)
    assert said in first.text
    assert not examined.can_train


def test_a_broken_parquet_table(folder):
    pytest.importorskip("pyarrow")
    (folder / "metadata.parquet").write_bytes(b"PAR1 and no more PAR1")
    assert told(folder)[0] == ("stops", "broken table", "metadata.parquet")


def test_one_broken_row_does_not_hide_the_others(folder):
    scene(1).save(folder / "b.png")
    (folder / "metadata.jsonl").write_text("{\n" + rows(("good.png", "a")) + "]\n" + rows(("b.png", "b")))
    examined = look(folder)
    assert [example.caption for example in examined.examples] == ["b", "a"]
    assert [found.text[:5] for found in examined.findings] == ["row 1", "row 3"]


def test_captions_that_are_no_text_or_have_no_picture(folder):
    (folder / "good.txt").write_bytes(b"caf\xe9")
    (folder / "gone.txt").write_text("a picture that was removed")
    (folder / "phone.HEIC").write_bytes(b"....ftypheic")
    (folder / "metadata.csv").write_text("file_name,text\n")
    (folder / "metadata.jsonl").write_text("")
    assert told(folder, missing_caption="error") == [
        ("stops", "unreadable caption", "good.png"),
        ("skipped", "other format", "phone.HEIC"),
        ("note", "caption without a picture", "gone.txt"),
        ("note", "unread table", "metadata.csv"),
    ]


# --- the command -------------------------------------------------------------------------------------------


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
