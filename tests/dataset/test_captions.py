"""Where captions come from: every layout that people have, what it gives, and what is said of it."""

import json
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from ldm.cli import main
from ldm.dataset.captions import clip_counter
from ldm.dataset.examine import examine
from ldm.errors import UserError


def picture(path, seed=None, size=(80, 64)):
    """A picture unlike any other, of `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()) if seed is None else seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BILINEAR).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one of them deeper."""
    for seed, name in enumerate(("a.png", "b.jpg", "deep/c.png")):
        picture(tmp_path / "mine" / name, seed)
    return tmp_path / "mine"


def captions(examined):
    return {e.path.relative_to(examined.folder).as_posix(): e.caption for e in examined.examples}


def told(examined):
    return [(found.effect, found.kind) for found in examined.findings]


def look(folder, **values):
    return examine(folder, resolution=64, **values)


EXPECTED = {"a.png": "a cat", "b.jpg": "a dog, sitting", "deep/c.png": "Ünï"}


def as_jsonl(rows):
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows.items())


def as_csv(rows, delimiter=","):
    return f"file_name{delimiter}text\r\n" + "".join(f'{k}{delimiter}"{v}"\r\n' for k, v in rows.items())


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", as_jsonl(EXPECTED)),
        ("metadata.csv", as_csv(EXPECTED)),
        ("metadata.csv", as_csv(EXPECTED, ";")),
    ],
)
def test_a_table(folder, name, text, mark):
    (folder / name).write_text(mark + text, encoding="utf-8", newline="")
    examined = look(folder)
    assert captions(examined) == EXPECTED
    assert examined.layout == f"3 from {name}"
    assert examined.findings == ()


def test_a_parquet_table(folder):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"file_name": list(EXPECTED), "text": list(EXPECTED.values()), "score": [1, 2, 3]}
    parquet.write_table(pa.table(columns), folder / "metadata.parquet")
    examined = look(folder)
    assert captions(examined) == EXPECTED
    assert [found.text for found in examined.findings] == ["columns that are not read: score"]


def test_a_parquet_table_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    examined = look(folder, missing_caption="skip")
    assert not examined.can_train
    assert "pip install pyarrow" in examined.findings[0].text


def test_nested_tables_name_files_from_where_they_lie(folder):
    (folder / "metadata.jsonl").write_text(as_jsonl({"a.png": "one", str(folder / "b.jpg"): "two"}))
    (folder / "deep" / "metadata.csv").write_text(as_csv({"c.png": "three"}))
    assert captions(look(folder)) == {"a.png": "one", "b.jpg": "two", "deep/c.png": "three"}


def test_a_row_may_go_up_and_back_and_name_a_file_without_a_suffix(folder):
    (folder / "a.png").rename(folder / "plain")
    rows = {"..\\plain": "one", "../b.jpg": "two", "./../deep/c.png": "three"}
    (folder / "deep" / "metadata.jsonl").write_text(as_jsonl(rows))
    examined = look(folder)
    assert captions(examined) == {"b.jpg": "two", "deep/c.png": "three", "plain": "one"}
    assert examined.findings == ()


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_files_beside(folder, suffix):
    for name, text in EXPECTED.items():
        (folder / name).with_suffix(suffix).write_text(f" {text}\n", encoding="utf-8")
    examined = look(folder)
    assert captions(examined) == EXPECTED
    assert examined.layout == f"3 from {suffix} files"
    assert examined.findings == ()


def test_utf16_and_several_lines(folder):
    for name in EXPECTED:
        (folder / name).with_suffix(".txt").write_text("a cat,\r\n  on a mat\r\n", encoding="utf-16")
    assert set(captions(look(folder)).values()) == {"a cat, on a mat"}


def test_what_goes_before_what(folder):
    (folder / "metadata.jsonl").write_text(as_jsonl({"a.png": "row"}))
    for name in EXPECTED:
        (folder / name).with_suffix(".txt").write_text("txt")
    (folder / "b.caption").write_text("caption")
    examined = look(folder)
    assert captions(examined) == {"a.png": "row", "b.jpg": "txt", "deep/c.png": "txt"}
    assert examined.layout == "2 from .txt files, 1 from metadata.jsonl"
    unread = [found.path.name for found in examined.findings if found.kind == "unread captions"]
    assert unread == ["a.txt", "b.caption"]


def test_one_prompt_for_all(folder):
    (folder / "metadata.jsonl").write_text("broken")
    (folder / "a.txt").write_text("not read")
    examined = look(folder, instance_prompt="a photo of sks dog")
    assert set(captions(examined).values()) == {"a photo of sks dog"}
    assert examined.layout == "3 from the instance prompt"
    assert told(examined) == [("note", "unread captions")] * 2


def test_captions_in_file_names(tmp_path):
    names = {
        "a_red_car.png": "a red car",
        "a red car (2).png": "a red car",
        "blue-house-03.jpg": "blue house",
        "the well-known inn copy.png": "the well-known inn",
    }
    for name in (*names, "IMG_1234.jpg"):
        picture(tmp_path / name)
    examined = look(tmp_path)
    assert captions(examined) == {**names, "IMG_1234.jpg": None}
    assert examined.layout == "4 from names of files, 1 without"
    assert told(examined) == [("stops", "missing caption")]


@pytest.mark.parametrize("names", [("IMG_1", "IMG_2"), ("3f2a-77", "0001"), ("cat", "dog")])
def test_names_that_say_nothing_are_no_captions(tmp_path, names):
    for name in names:
        picture(tmp_path / f"{name}.png")
    assert told(look(tmp_path)) == [("stops", "missing caption")] * 2


def test_kohya_folders(tmp_path):
    for name in ("10_sks dog/1.png", "10_sks dog/more/2.png", "3_cat/3.png", "2024_summer/4.png"):
        picture(tmp_path / name)
    (tmp_path / "3_cat" / "3.txt").write_text("a cat that sleeps")
    examined = look(tmp_path, missing_caption="empty")
    assert [(e.path.name, e.repeats, e.caption) for e in examined.examples] == [
        ("1.png", 10, "sks dog"),
        ("2.png", 10, "sks dog"),
        ("4.png", 1, ""),
        ("3.png", 3, "a cat that sleeps"),
    ]
    assert told(examined) == [("fixed", "missing caption"), *[("note", "repeats")] * 3]
    assert "2 from names of folders" in examined.layout


@pytest.mark.parametrize(
    ("choice", "effect", "left"), [("error", "stops", None), ("empty", "fixed", ""), ("skip", "skipped", ...)]
)
def test_missing_captions(folder, choice, effect, left):
    (folder / "a.txt").write_text("a cat")
    (folder / "b.txt").write_text(" \n")
    examined = look(folder, missing_caption=choice)
    assert told(examined) == [(effect, "empty caption"), (effect, "missing caption")]
    expected = {"a.png": "a cat", "b.jpg": left, "deep/c.png": left}
    assert captions(examined) == {name: text for name, text in expected.items() if text is not ...}
    assert examined.can_train == (choice != "error")


def test_long_captions_are_counted_in_tokens(folder):
    (folder / "a.txt").write_text("cat " * 75)
    (folder / "b.txt").write_text("cat " * 78)
    (folder / "deep" / "c.txt").write_text("🦄" * 30)  # few characters, more tokens
    count = clip_counter()
    assert [count(text) for text in ("", "a cat", "cat " * 75)] == [0, 2, 75]
    examined = look(folder, count_tokens=count)
    assert [(found.path.name, found.kind) for found in examined.findings] == [("b.jpg", "long caption")]
    assert "78 tokens" in examined.findings[0].text
    assert "75 at once: it is read in 2 parts" in examined.findings[0].text
    assert told(look(folder, count_tokens=count, window=20)) == [("note", "long caption")] * 3


def test_a_long_prompt_for_all_is_told_once(folder):
    examined = look(folder, instance_prompt="cat " * 80, count_tokens=clip_counter())
    assert [(found.path, found.kind) for found in examined.findings] == [(None, "long caption")]


def test_sizes_are_height_and_width_and_digests_are_sha256(folder):
    import hashlib

    example = look(folder, missing_caption="empty").examples[0]
    assert example.size == (64, 80)
    assert example.digest == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        examine(tmp_path / "nowhere")
    with pytest.raises(UserError, match="missing_caption 'no' is not one of error, empty, skip"):
        examine(tmp_path, missing_caption="no")
    assert told(examine(tmp_path)) == [("stops", "no pictures")]


def test_the_bar_counts_to_the_end(folder):
    seen = []
    look(folder, missing_caption="empty", on_progress=lambda *of: seen.append(of))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- other spellings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Metadata.jsonl", "metadata.JSONL", "METADATA.CSV", "metadata.Csv"])
def test_a_table_in_another_case(folder, name):
    text = as_csv(EXPECTED) if name.lower().endswith("csv") else as_jsonl(EXPECTED)
    (folder / name).write_text(text, encoding="utf-8")
    examined = look(folder)
    assert captions(examined) == EXPECTED
    assert examined.layout == f"3 from {name}"
    assert examined.findings == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metadata.json", "call it metadata.jsonl and write one JSON object in each line"),
        ("metadata.json1", "call it metadata.jsonl,"),
        ("metadata.jsonl.txt", "call it metadata.jsonl,"),
        ("captions.json", "call it metadata.jsonl and write"),
        ("meta_cap.json", "call it metadata.jsonl and write"),
        ("Captions.CSV", "call it metadata.csv,"),
        ("metadata.tsv", "call it metadata.csv,"),
        ("train-00000-of-00001.parquet", "call it metadata.parquet,"),
        ("prompts.ndjson", "call it metadata.jsonl,"),
    ],
)
def test_a_table_of_another_name_is_named(folder, name, said):
    (folder / name).write_text(as_jsonl(EXPECTED), encoding="utf-8")
    examined = look(folder, missing_caption="empty")
    (found,) = (each for each in examined.findings if each.path == folder / name)
    assert said in found.text
    assert found.effect == "note"


def test_json_that_is_no_table_is_not_worth_a_line(folder):
    for name in ("model_index.json", "a.json", "package.json"):
        (folder / name).write_text("{}")
    assert all(each.path.suffix != ".json" for each in look(folder).findings)


ROWS = [{"file_name": name, "text": text} for name, text in EXPECTED.items()]
NO_LINES = [json.dumps(ROWS, indent=indent) for indent in (None, 1, 4)]
NO_LINES += [json.dumps(ROWS[0], indent=2), '[\n{"file_name": "a.png", "text": "a"},\n']


@pytest.mark.parametrize("text", NO_LINES)
def test_json_that_is_no_lines_is_one_finding(folder, text):
    (folder / "metadata.jsonl").write_text(text)
    broken = [each for each in look(folder).findings if each.path == folder / "metadata.jsonl"]
    assert [(each.effect, each.kind) for each in broken] == [("stops", "broken table")]
    assert "one JSON value and not lines of it" in broken[0].text


def table_of(suffix, columns):
    rows = [dict(zip(columns, pair, strict=True)) for pair in EXPECTED.items()]
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    return ",".join(columns) + "\n" + "".join(f'{k},"{v}"\n' for k, v in EXPECTED.items())


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_columns_by_other_names(folder, suffix):
    (folder / f"metadata.{suffix}").write_text(table_of(suffix, ("picture", "prompt")), encoding="utf-8")
    (broken,) = (each for each in look(folder).findings if each.kind == "broken table")
    said = "no column file_name and no text, but picture, prompt: name its columns so, or say with "
    assert said + "--image-column and --caption-column" in broken.text
    examined = look(folder, image_column="picture", caption_column="prompt")
    assert captions(examined) == EXPECTED
    assert examined.findings == ()
    (broken,) = (each for each in look(folder, caption_column="txet").findings if each.kind == "broken table")
    assert "no column file_name and no txet, but picture, prompt" in broken.text


def test_columns_of_a_parquet_table(folder):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"file_name": list(EXPECTED), "prompt": list(EXPECTED.values())}
    parquet.write_table(pa.table(columns), folder / "METADATA.PARQUET")
    assert captions(look(folder, caption_column="prompt")) == EXPECTED


def test_the_column_of_pictures_as_datasets_calls_it(folder):
    """diffusers' scripts have --image_column=image, which datasets makes of file_name."""
    (folder / "metadata.jsonl").write_text(as_jsonl(EXPECTED))
    assert captions(look(folder, image_column="image")) == EXPECTED
    (folder / "metadata.jsonl").write_text(table_of("jsonl", ("image", "text")))
    assert captions(look(folder, image_column="image")) == EXPECTED


def test_the_flags_of_columns(folder, capsys):
    (folder / "metadata.jsonl").write_text(table_of("jsonl", ("picture", "prompt")), encoding="utf-8")
    flags = ["--resolution", "64", "--image-column", "picture"]
    assert main(["folder", str(folder), *flags, "--caption_column", "prompt"]) == 0
    assert "captions: 3 from metadata.jsonl" in capsys.readouterr().out
    assert main(["folder", str(folder), *flags]) == 2
    assert "no column text, but picture, prompt" in capsys.readouterr().out


def test_columns_without_a_table_are_told(folder):
    assert ("note", "no table") in told(look(folder, caption_column="prompt"))
    assert ("note", "no table") not in told(look(folder))


@pytest.mark.parametrize("name", ["IMG_1.JPG", "IMG_1.jpg", "img.1.PNG"])
@pytest.mark.parametrize("suffix", [".TXT", ".Caption", ".txt"])
def test_suffixes_in_any_case(tmp_path, name, suffix):
    path = picture(tmp_path / name)
    path.with_suffix(suffix).write_text("a cat")
    examined = look(tmp_path)
    assert captions(examined) == {name: "a cat"}
    assert examined.layout == f"1 from {suffix.lower()} files"
    assert examined.findings == ()


def test_captions_of_one_picture_in_two_spellings(tmp_path):
    picture(tmp_path / "a.png")
    for suffix, text in ((".caption", "third"), (".TXT", "first"), (".txt", "second")):
        (tmp_path / f"a{suffix}").write_text(text)
    examined = look(tmp_path)
    assert captions(examined) == {"a.png": "first"}  # as the names are sorted
    unread = [each.path.suffix for each in examined.findings if each.kind == "unread captions"]
    assert unread == [".caption", ".txt"]


@pytest.mark.parametrize(("stored", "named"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
@pytest.mark.parametrize("word", ["Schäfchen", "Ñandú", "한국", "Å"])
def test_names_in_both_forms_of_unicode(tmp_path, stored, named, word):
    """A table and caption files of one system, pictures of another: macOS decomposes names."""
    on_disk, written = unicodedata.normalize(stored, word), unicodedata.normalize(named, word)
    for path in (tmp_path / "table", tmp_path / "beside"):
        picture(path / f"{on_disk}.png")
    (tmp_path / "table/metadata.jsonl").write_text(as_jsonl({f"{written}.png": "a sheep"}), encoding="utf-8")
    (tmp_path / "beside" / f"{written}.txt").write_text("a sheep")
    for path in (tmp_path / "table", tmp_path / "beside"):
        examined = look(path)
        assert captions(examined) == {f"{on_disk}.png": "a sheep"}
        assert examined.findings == ()
