"""Tables of requests: what they give, and one line for what is wrong with them."""

import contextlib
import hashlib
import io
import json
import random

import pyarrow as pa
import pytest
from bulk_rows import write_jsonl
from pyarrow import parquet

from ldm.bulk.mapper import request_of
from ldm.bulk.rows import read_rows, seed_of
from ldm.errors import UserError

SAME = [
    {
        "id": "a",
        "prompt": "a red boat, at sea",
        "steps": 7,
        "cfg": 4.5,
        "width": 64,
        "timesteps": [9, 5, 0.5],
    },
    {"id": "007", "prompt": "the sea", "seed": 3, "loras": [{"name": "style", "weight": 0.5}], "fast": True},
    {"id": "c", "prompt": '"quoted"\nlines', "negative_prompt": "grey", "sampler": "DPM++ 2M Karras"},
]


def read(path, *others):
    rows = read_rows([str(path), *map(str, others)])
    return {rows[i].id: request_of(rows[i]) for i in range(len(rows))}, rows


def write_csv(path, rows, delimiter=","):
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in names] for row in rows]
    texts = [[each if isinstance(each, str) else json.dumps(each) for each in line] for line in cells]
    lines = [delimiter.join('"' + text.replace('"', '""') + '"' for text in line) for line in (names, *texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_all_formats_say_the_same(tmp_path):
    jsonl, _ = read(write_jsonl(tmp_path / "r.jsonl", SAME))
    parquet.write_table(pa.Table.from_pylist(SAME_FILLED), tmp_path / "r.parquet")
    found = [read(tmp_path / "r.parquet")[0], read(write_csv(tmp_path / "r.csv", SAME))[0]]
    found += [read(write_csv(tmp_path / "s.csv", SAME, ";"))[0]]
    assert found == [jsonl] * 3
    assert jsonl["a"].num_inference_steps == 7
    assert jsonl["a"].guidance_scale == 4.5
    assert jsonl["007"].seeds == (3,)
    assert jsonl["007"].loras[0].weight == 0.5
    assert (jsonl["c"].sampler, jsonl["c"].spacing) == ("dpmpp_2m", "karras")


NAMES = dict.fromkeys(name for row in SAME for name in row)
SAME_FILLED = [{name: row.get(name) for name in NAMES} for row in SAME]


def test_a_seed_follows_from_its_id(tmp_path):
    """By the definition in docs/bulk.md; a negative one is none, as everywhere."""
    number = int(hashlib.sha256(b"row-1").hexdigest()[:16], 16) // 2**11
    assert seed_of("row-1") == number == int(float(number))
    rows = [{"id": "row-1", "prompt": "x"}, {"id": "row-2", "prompt": "x", "seed": -1}]
    found, _ = read(write_jsonl(tmp_path / "r.jsonl", rows))
    assert found["row-1"].seeds == (number,)
    assert found["row-2"].seeds == (seed_of("row-2"),)


def test_numbers_with_gaps_are_whole(tmp_path):
    """As pandas keeps them: a column of doubles, with nothing for what is not there."""
    table = pa.table({"id": [1.0, 2.0], "width": [64.0, None], "seed": [5.0, None], "prompt": ["a", "b"]})
    parquet.write_table(table, tmp_path / "r.parquet")
    found, _ = read(tmp_path / "r.parquet")
    assert (found["1"].width, found["1"].seeds, found["2"].width) == (64, (5,), None)


def test_the_digest_is_of_what_is_asked(tmp_path):
    """Whatever file it is in; and any change of a row changes it."""
    _, rows = read(write_jsonl(tmp_path / "r.jsonl", SAME))
    halves = write_jsonl(tmp_path / "1.jsonl", SAME[:1]), write_jsonl(tmp_path / "2.jsonl", SAME[1:])
    assert read_rows(halves).digest == rows.digest == read_rows([str(tmp_path / "[12].jsonl*")]).digest
    turned = [dict(reversed(row.items())) for row in SAME]
    assert read_rows([write_jsonl(tmp_path / "t.jsonl", turned)]).digest == rows.digest
    for k, change in ((0, {"steps": 8}), (1, {"id": "7"}), (2, {"prompt": "x"})):
        other = [{**row, **(change if i == k else {})} for i, row in enumerate(SAME)]
        assert read_rows([write_jsonl(tmp_path / "o.jsonl", other)]).digest != rows.digest


A, B = {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}
BAD = [
    ([A, B, A], "row 3: the id a is there twice"),
    ([A, {**B, "widht": 64}], "row 2: unknown column 'widht': did you mean width"),
    ([A, {"prompt": "x"}], "row 2: it has no id"),
    ([A, {"id": "../b", "prompt": "x"}], "row 2: the id '../b' is not allowed"),
    ([A, {"id": "b.c", "prompt": "x"}], "row 2: the id 'b.c' is not allowed"),
    ([A, {"id": "x" * 91, "prompt": "x"}], "is not allowed"),
    ([A, {"id": 2.5, "prompt": "x"}], "row 2: id is a number here, and a text in"),
    ([{**A, "width": 64}, {**B, "width": "64"}], "row 2: width is a text here, and a number in"),
    ([A, {"id": "b", "prompt": ["x"]}], "row 2: prompt is a list here, and a text in"),
    ([{**A, "steps": 3, "num_inference_steps": 4}], "row 1: num_inference_steps has two columns"),
    ([], "no rows in"),
]


@pytest.mark.parametrize(("rows", "fault"), BAD)
def test_a_table_that_is_wrong_is_refused(rows, fault, tmp_path):
    with pytest.raises(UserError) as error:
        read_rows([write_jsonl(tmp_path / "r.jsonl", rows)])
    assert fault in str(error.value)
    assert "r.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_second_table_of_another_schema_is_refused(tmp_path):
    parquet.write_table(pa.table({"id": ["a"], "steps": [3]}), tmp_path / "1.parquet")
    parquet.write_table(pa.table({"id": ["b"], "steps": ["3"]}), tmp_path / "2.parquet")
    with pytest.raises(UserError, match=r"2\.parquet, row 1: steps is a text here, and a number in .*1\.par"):
        read_rows([str(tmp_path / "*.parquet")])


BYTES = [
    ("r.jsonl", b'{"id": "a"\n', "row 1: it is not JSON"),
    ("r.jsonl", b'{"id": "a"}\n[1]\n', "row 2: it is no JSON object"),
    ("r.jsonl", b'{"id": "a\xff"}\n', "not UTF-8"),
    ("r.csv", b"id,prompt\na,x\nb,x,y\n", "row 3: it has 3 fields, and the head 2"),
    ("r.csv", b"id,id\na,x\n", "the column id is there twice"),
    ("r.csv", b'id,prompt\na,"x\n', "cannot read"),
    ("r.parquet", b"PAR1", "cannot read"),
    ("r.parquet", b"", "cannot read"),
    ("r.txt", b"a prompt", "is no table that is read"),
]


@pytest.mark.parametrize(("name", "data", "fault"), BYTES)
def test_a_file_that_is_damaged_is_refused(name, data, fault, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read_rows([str(tmp_path / name)])
    assert fault in str(error.value)
    assert name in str(error.value)


def test_a_shard_that_is_cut_or_changed_is_refused_or_read(tmp_path):
    """At any place: never by another error."""
    data = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{"id": f"r{k}", "prompt": "x" * k} for k in range(50)]), data)
    whole, moments, path = data.getvalue(), random.Random(0), tmp_path / "r.parquet"
    refused = 0
    for _ in range(40):
        broken = bytearray(whole[: moments.choice([len(whole), moments.randrange(len(whole))])])
        for _ in range(moments.randrange(1, 9)):
            broken[moments.randrange(len(broken))] = moments.randrange(256) if broken else 0
        path.write_bytes(broken)
        with contextlib.suppress(UserError):
            read_rows([str(path)])
            continue
        refused += 1
    assert refused > 20


def test_bytes_are_no_field(tmp_path):
    parquet.write_table(pa.table({"id": ["a"], "prompt": [b"x"]}), tmp_path / "r.parquet")
    with pytest.raises(UserError, match="row 1: prompt holds bytes, which no field of a request is"):
        read_rows([str(tmp_path / "r.parquet")])


def test_a_file_that_is_not_there(tmp_path):
    for name in ("r.jsonl", "*.jsonl"):
        with pytest.raises(UserError, match=r"jsonl"):
            read_rows([str(tmp_path / name)])
