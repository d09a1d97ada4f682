"""A run's workers draw the same bits, or are refused in one line."""

import json
import shutil

import pytest
import torch
from bulk_rows import ROWS, write_jsonl
from safetensors.torch import load_file, save_file

from ldm.bulk.objects import open_filesystem
from ldm.bulk.storage import open_storage
from ldm.cli import main
from ldm.errors import UserError

CHANGES = [
    (("--batch", "3"), "--batch 8, this worker has 3"),
    (("--shards", "4"), "--shards null, this worker has 4"),
    (("--format", "webp"), 'format ["png", null, false], this worker has ["webp", null, false]'),
    (("--no-provenance",), "marks of origin [true, null], this worker has [false, null]"),
    (("--threads", "3"), "threads, this worker has cpu, "),
]


@pytest.fixture
def begun(bulk, tmp_path):
    """A run of one row, and its flags."""
    table = write_jsonl(tmp_path / "r.jsonl", [{**ROWS[0], "prompt": "the boat <lora:style:0.5>"}])
    flags = (table, "-o", str(tmp_path / "out"), "--lora-dir", str(tmp_path / "loras"))
    assert bulk(*flags)[0] == 2  # there is no such LoRA yet
    return flags


@pytest.mark.parametrize(("flags", "fault"), CHANGES)
def test_other_flags_are_refused(bulk, begun, flags, fault):
    try:
        code, said = bulk(*begun, *flags)
    finally:
        torch.set_num_threads(1)
    assert (code, fault in said) == (2, True), said
    assert said.splitlines()[-1].startswith("ldm: ")
    assert "make them agree, or give another --out" in said


def test_another_dtype_is_refused(bulk, begun):
    assert "was begun with dtype float32, this worker has bfloat16" in bulk(*begun, dtype="bf16")[1]


def test_other_rows_are_refused(bulk, begun, tmp_path):
    write_jsonl(tmp_path / "r.jsonl", ROWS[:2])
    assert "was begun with requests" in bulk(*begun)[1]


def test_other_weights_are_refused(bulk, begun, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (file,) = (other / "unet").glob("*.safetensors")
    weights = load_file(file)
    first = sorted(weights)[0]
    save_file({**weights, first: weights[first] + 1}, file, {"format": "pt"})
    code, said = bulk(*begun, model=other)
    was = json.loads((tmp_path / "out" / "run.json").read_text())["model_hash"]
    assert (code, f"was begun with model {was}, this worker has " in said) == (2, True), said


def test_another_lora_of_that_name_is_refused(bulk, begun, tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "style.safetensors").write_bytes(b"0")
    assert "was begun with LoRAs and embeddings" in bulk(*begun)[1]


def test_another_version_is_refused(bulk, begun, monkeypatch):
    monkeypatch.setattr("ldm.bulk.run.__version__", "9.9")
    assert "was begun with ldm 0.1.0, this worker has 9.9" in bulk(*begun)[1]


def test_a_damaged_note_is_no_run(bulk, begun, tmp_path):
    (tmp_path / "out" / "run.json").write_text("{")
    assert "run.json cannot be read: it is no run of ldm bulk" in bulk(*begun)[1]


def test_rows_name_models(bulk, tiny_folder, tmp_path):
    """Each row is drawn by its own; one that is not there is said before anything is drawn."""
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    (file,) = (other / "unet").glob("*.safetensors")
    save_file({name: 0.9 * each for name, each in load_file(file).items()}, file, {"format": "pt"})
    rows = [
        {"id": "own", "prompt": "the sea", "steps": 2, "width": 16, "height": 16, "seed": 1},
        {"id": "other", "prompt": "the sea", "steps": 2, "width": 16, "height": 16, "seed": 1},
    ]
    alone = {}
    for row, model in zip(rows, (tiny_folder, other), strict=True):
        table = write_jsonl(tmp_path / f"{row['id']}.jsonl", [row])
        bulk(table, "-o", tmp_path / f"alone-{row['id']}", model=model)
        alone[row["id"]] = (tmp_path / f"alone-{row['id']}/pictures/00000/{row['id']}.png").read_bytes()
    rows[1]["model"] = str(other)
    code, said = bulk(write_jsonl(tmp_path / "both.jsonl", rows), "-o", tmp_path / "both")
    assert code == 0, said
    for name, data in alone.items():
        assert (tmp_path / f"both/pictures/00000/{name}.png").read_bytes() == data
    assert len(set(alone.values())) == 2
    rows[1]["model"] = str(tmp_path / "nowhere")
    code, said = bulk(write_jsonl(tmp_path / "none.jsonl", rows), "-o", tmp_path / "none")
    assert (code, "nowhere" in said.splitlines()[-1]) == (2, True)
    assert not (tmp_path / "none" / "pictures").exists()


@pytest.mark.parametrize("place", ["ftp://host/folder", "http://host/folder", "hdfs://a/b"])
def test_places_that_may_leave_half_a_file(place):
    with pytest.raises(UserError, match="others may leave half a file"):
        open_storage(place, "rank-0")


def test_a_store_without_its_package():
    with pytest.raises(UserError, match="gs:// needs gcsfs: pip install"):
        open_filesystem("gs://bucket/folder")


def test_without_pyarrow(table, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert main(["bulk", table, "-o", str(tmp_path / "out")]) == 2
    assert "bulk drawing needs pyarrow: pip install 'ldm[bulk]'" in capsys.readouterr().err


def test_a_bucket_that_is_not_there(bulk, table, bucket):
    code, said = bulk(table, "-o", "s3://elsewhere/out")
    assert (code, "cannot write to s3://elsewhere/out/run.json: " in said) == (2, True), said


def test_only_the_first_begins_a_run(bucket, tmp_path):
    for place in (bucket, str(tmp_path)):
        store = open_storage(place, "rank-0")
        with store.claimed():
            assert store.create("run.json", b"first")
            assert not store.create("run.json", b"second")
            assert store.get("run.json") == b"first"
            assert store.get("other.json") is None
            assert store.size("other.json") is None
            assert store.digest("other.json") is None
