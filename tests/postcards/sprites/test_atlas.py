"""The shipped atlas, and building one."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.postcards.sprites import build
from ldm.postcards.sprites.atlas import CELL, FOLDER, STYLES, _sheet, load_things, pixels


def test_its_size_and_notice():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8 * 2**20
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for said in ("Microsoft", "MIT License", "Google", "Apache License", "Twemoji", "without restriction"):
        assert said in notice
    assert "creativecommons.org/licenses/by/4.0" in notice
    assert all(f"{style}.webp" in notice for style in STYLES)


def test_there_are_hundreds_of_things_with_names_of_their_own():
    things = load_things()
    assert len(things) >= 400
    names = [name for thing in things for name in {thing.noun, thing.plural, *thing.also} - {None}]
    assert len(names) == len(set(names))
    assert {thing.realm for thing in things} == {
        "ground",
        "air",
        "water",
        "table",
        "food",
        "portrait",
        "icon",
    }


def test_each_sprite_fills_its_box_and_nothing_else_is_in_its_cell():
    things = load_things()
    for style in STYLES:
        alpha = _sheet(style, FOLDER)[..., 3]
        columns = alpha.shape[1] // CELL
        for thing in things[::7]:
            sprite, cut = thing.sprites[style], pixels(thing, style)[..., 3]
            assert max(sprite.width, sprite.height) == CELL
            assert min(cut[0].max(), cut[-1].max(), cut[:, 0].max(), cut[:, -1].max()) > 8
            row, column = divmod(thing.number, columns)
            cell = alpha[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].copy()
            cell[: sprite.height, : sprite.width] = 0
            assert cell.max() < 8


def test_measures_are_those_of_the_pixels():
    for thing in load_things()[::25]:
        for style in STYLES:
            drawn = pixels(thing, style)
            mean = drawn[drawn[..., 3] > 128][:, :3].mean(0)
            np.testing.assert_allclose(thing.sprites[style].mean, mean, atol=6)  # WebP has lost some


def test_no_atlas_is_told(tmp_path):
    with pytest.raises(UserError, match="clone"):
        load_things(tmp_path)


# --- building ----------------------------------------------------------------------------------------------


def archive(file, members):
    with tarfile.open(file, "w:gz") as opened:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            opened.addfile(entry, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path):
    """Two things in all four sets: a red bar, and a blue disc."""
    red, blue = ('<path fill="#f00" d="M2 4h12v3H2z"/>', '<circle fill="#00f" cx="8" cy="8" r="4"/>')
    icons = json.dumps({"icons": {"bar": {"body": red}, "disc": {"body": blue}}, "height": 16}).encode()
    names = json.dumps({"2b1b-fe0f": "bar", "1f535": "disc"}).encode()
    for style, package in build.PACKAGES.items():
        name, _, version = package[1:].rpartition("@")
        file = tmp_path / f"{name.replace('/', '-')}-{version}.tgz"
        if style != "3d":
            archive(file, {"icons.json": icons, "chars.json": names})
            continue
        files = {}
        for code, colour in (("2b1b", "red"), ("1f535", "blue")):
            drawn = Image.new("RGBA", (64, 64))
            drawn.paste(colour, (8, 16, 56, 28))
            buffer = io.BytesIO()
            drawn.save(buffer, "WEBP", lossless=True)
            files[f"assets/{code}.webp"] = buffer.getvalue()
        archive(file, files)
    return tmp_path


TABLE = "code\tnoun\tplural\tarticle\trealm\tsize\talso\n"


def test_an_atlas_is_built_from_packages(packages, tmp_path):
    pytest.importorskip("resvg_py")
    table = tmp_path / "things.tsv"
    table.write_text(TABLE + "2b1b\tbar\tbars\ta\tground\tbig\trod|pole\n1f535\tdisc\t-\t-\ticon\t-\t-\n")
    build.build(table, tmp_path / "out", packages)
    bar, disc = load_things(tmp_path / "out")
    assert (bar.noun, bar.plural, bar.article, bar.big, bar.also) == (
        "bar",
        "bars",
        "a",
        True,
        ("rod", "pole"),
    )
    assert (disc.plural, disc.article, disc.big, disc.also) == (None, "", False, ())
    assert bar.sprites["flat"].aspect == pytest.approx(4, abs=0.1)
    assert bar.sprites["3d"].aspect == pytest.approx(4, abs=0.1)
    assert bar.sprites["noto"].paintable
    assert not disc.sprites["noto"].paintable  # an icon stays as it is
    drawn = pixels(bar, "twemoji", folder=tmp_path / "out")
    np.testing.assert_allclose(drawn[20, 70], (255, 0, 0, 255), atol=8)


def test_what_a_set_lacks_is_named(packages, tmp_path):
    pytest.importorskip("resvg_py")
    table = tmp_path / "things.tsv"
    table.write_text(TABLE + "1f996\tt-rex\tt-rexes\ta\tground\t-\t-\n")
    with pytest.raises(UserError, match=r"lacks t-rex \(1f996\)"):
        build.build(table, tmp_path / "out", packages)
