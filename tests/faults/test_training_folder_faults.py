"""A folder to train on: copies, links, tables and captions; each that is wrong is named, none crashes."""

import json

import pytest
from broken_pictures import examine_pictures, found_in, make_folder, scene


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def test_copies(folder):
    data = (folder / "good.png").read_bytes()
    (folder / "same.png").write_bytes(data)
    (folder / "two.png").write_bytes(data)
    (folder / "two.txt").write_text("another caption")
    scene(0).resize((48, 36)).save(folder / "small.jpg", quality=80)
    assert found_in(folder) == [
        ("skipped", "duplicate", "same.png"),
        ("note", "duplicate", "two.png"),
        ("note", "near duplicate", "small.jpg"),
    ]
    assert [example.path.name for example in examine_pictures(folder).examples] == [
        "good.png",
        "small.jpg",
        "two.png",
    ]


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
    assert found_in(folder) == [
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
    assert found_in(folder, missing_caption="error") == [
        ("stops", "file without a row", "other.png"),
        ("skipped", "repeated row", "metadata.jsonl"),
        *[("skipped", "row leaves the folder", "metadata.jsonl")] * 2,
        *[("skipped", "row without a file", "metadata.jsonl")] * 3,
    ]
    texts = [
        found.text for found in examine_pictures(folder).findings if found.kind == "row leaves the folder"
    ]
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
    examined = examine_pictures(folder)
    first = examined.findings[0]
    assert (first.effect, first.kind, first.path) == ("stops", kind, folder / name)
    assert said in first.text
    assert not examined.can_train


def test_a_broken_parquet_table(folder):
    pytest.importorskip("pyarrow")
    (folder / "metadata.parquet").write_bytes(b"PAR1 and no more PAR1")
    assert found_in(folder)[0] == ("stops", "broken table", "metadata.parquet")


def test_one_broken_row_does_not_hide_the_others(folder):
    scene(1).save(folder / "b.png")
    (folder / "metadata.jsonl").write_text("{\n" + rows(("good.png", "a")) + "]\n" + rows(("b.png", "b")))
    examined = examine_pictures(folder)
    assert [example.caption for example in examined.examples] == ["b", "a"]
    assert [found.text[:5] for found in examined.findings] == ["row 1", "row 3"]


def test_captions_that_are_no_text_or_have_no_picture(folder):
    (folder / "good.txt").write_bytes(b"caf\xe9")
    (folder / "gone.txt").write_text("a picture that was removed")
    (folder / "phone.HEIC").write_bytes(b"....ftypheic")
    (folder / "metadata.csv").write_text("file_name,text\n")
    (folder / "metadata.jsonl").write_text("")
    assert found_in(folder, missing_caption="error") == [
        ("stops", "unreadable caption", "good.png"),
        ("skipped", "other format", "phone.HEIC"),
        ("note", "caption without a picture", "gone.txt"),
        ("note", "unread table", "metadata.csv"),
    ]
