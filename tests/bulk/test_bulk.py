"""`ldm bulk`: a table becomes pictures, whoever draws them, and again only what is missing."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from bulk_rows import ROWS, write_jsonl
from PIL import Image
from pyarrow import parquet

import ldm
from ldm.images.png import read_request
from ldm.request import Request


def manifest(out, name="manifest"):
    return parquet.read_table(out / f"{name}.parquet").to_pylist()


def files(out):
    """All that pictures and tables hold, by name."""
    found = [path for path in out.rglob("*") if path.is_file()]
    kept = [path for path in found if path.parent.name not in ("log", "rank-0", "rank-1")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in kept}


def test_each_row_is_its_picture(bulk, table, tiny_folder, tmp_path):
    """Every pixel as the pipeline draws it alone, to the rounding of sums."""
    code, said = bulk(table, "-o", tmp_path / "out")
    assert (code, "7 pictures drawn" in said) == (0, True), said
    rows = manifest(tmp_path / "out")
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    pipe = ldm.load(str(tiny_folder), device=None, dtype="fp32")
    for row, asked in zip(rows, ROWS, strict=True):
        data = (tmp_path / "out" / row["file"]).read_bytes()
        assert row["sha256"] == row["file_sha256"] == hashlib.sha256(data).hexdigest()
        assert row["size"] == len(data)
        seed = int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) >> (256 - 53)
        request = Request(
            prompt=asked["prompt"], seeds=(seed,), num_inference_steps=2, width=asked["width"], height=16
        )
        image = np.asarray(Image.open(io.BytesIO(data)), dtype=int)
        alone = np.asarray(pipe.generate(request).images[0], dtype=int)
        assert image.shape == alone.shape == (row["height"], row["width"], 3)
        assert np.abs(image - alone).max() <= 1
        assert row["seed"] == seed
        assert read_request(tmp_path / "out" / row["file"]).seeds == (seed,)
    assert manifest(tmp_path / "out", "failed") == []


@pytest.mark.parametrize("shards", [(), ("--shards", "4")])
def test_two_workers_write_what_one_does(bulk, table, tmp_path, shards):
    flags = ("--batch", "2", *shards)
    bulk(table, "-o", tmp_path / "one", *flags)
    code, said = bulk(table, "-o", tmp_path / "two", *flags, "--rank", "1", "--world", "2")
    assert code == 0
    assert "other workers'" in said
    assert not (tmp_path / "two" / "manifest.parquet").exists()
    bulk(table, "-o", tmp_path / "two", *flags, "--rank", "0", "--world", "2")
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_shard_holds_what_the_files_are(bulk, table, tmp_path):
    bulk(table, "-o", tmp_path / "files", "--batch", "2")
    bulk(table, "-o", tmp_path / "tars", "--batch", "2", "--shards", "4")
    members = {}
    for path in sorted((tmp_path / "tars" / "shards").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                members[member.name] = tar.extractfile(member).read()
    assert len(members) == 21
    for row, other in zip(manifest(tmp_path / "tars"), manifest(tmp_path / "files"), strict=True):
        data = (tmp_path / "files" / other["file"]).read_bytes()
        assert members[f"{row['id']}.png"] == data
        with (tmp_path / "tars" / row["file"]).open("rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size"]) == data
        asked = next(each for each in ROWS if each["id"] == row["id"])
        assert members[f"{row['id']}.txt"].decode() == asked["prompt"]
        assert json.loads(members[f"{row['id']}.json"])["seeds"] == [row["seed"]]


@pytest.mark.parametrize("shards", [(), ("--shards", "4")])
def test_what_is_lost_or_changed_is_drawn_again(bulk, table, tmp_path, shards):
    out, flags = tmp_path / "out", ("--batch", "2", *shards)
    bulk(table, "-o", out, *flags)
    before = files(out)
    names = sorted(name for name in before if name.startswith(("pictures", "shards")))
    (out / names[0]).unlink()
    data = (out / names[-1]).read_bytes()
    (out / names[-1]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, said = bulk(table, "-o", out, *flags)
    assert code == 0
    assert f"{7 if shards else 2} pictures drawn" in said
    assert files(out) == before
    assert "0 pictures drawn, 7 were there" in bulk(table, "-o", out, *flags)[1]


def test_trusting_sizes_reads_no_file(bulk, table, tmp_path):
    out = tmp_path / "out"
    bulk(table, "-o", out)
    (path,) = (out / "pictures").rglob("row-3.png")
    path.write_bytes(bytes(len(path.read_bytes())))
    assert "0 pictures drawn" in bulk(table, "-o", out, "--trust-sizes")[1]
    assert "1 picture drawn" in bulk(table, "-o", out)[1]


@pytest.mark.parametrize("shards", [(), ("--shards", "4")])
def test_a_bad_row_fails_alone(bulk, table, tmp_path, shards):
    """By its values, and at drawing: a picture that is not there yet, and then is."""
    rows = [*ROWS, {"id": "odd", "prompt": "the red boat", "width": 13}]
    late = {"id": "late", "prompt": "the sea", "steps": 2, "image": str(tmp_path / "late.png"), "width": 16}
    rows += [late, {"id": "two", "prompt": "the sea", "seeds": [1, 2]}]
    other, out = write_jsonl(tmp_path / "bad.jsonl", rows), tmp_path / "out"
    code, said = bulk(other, "-o", out, "--batch", "2", *shards)
    assert code == 2
    assert "rows that failed: 3" in said
    failed = {row["id"]: row["error"] for row in manifest(out, "failed")}
    assert "width 13 is not allowed" in failed["odd"]
    assert "late.png" in failed["late"]
    assert "a row is one picture" in failed["two"]
    bulk(table, "-o", tmp_path / "good", "--batch", "2", *shards)
    good = {row["id"]: row["sha256"] for row in manifest(tmp_path / "good")}
    assert {row["id"]: row["sha256"] for row in manifest(out)} == good
    assert "0 pictures drawn" in bulk(other, "-o", out, "--batch", "2", *shards)[1]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "late.png")
    code, said = bulk(other, "-o", out, "--batch", "2", *shards, "--retry-failed")
    assert (code, "1 picture drawn, 7 were there" in said) == (2, True), said
    assert len(manifest(out)) == 8
    assert {row["id"] for row in manifest(out, "failed")} == {"odd", "two"}


def test_verify_draws_again(bulk, table, tmp_path):
    out = tmp_path / "out"
    bulk(table, "-o", out, "--batch", "2")
    code, said = bulk(table, "-o", out, "--batch", "2", "--verify", "3")
    assert (code, "3 rows drawn again: 3 are equal" in said) == (0, True), said
    # Another picture under a name, and a log that says it is right: only drawing tells.
    (path,) = (out / "pictures").rglob("row-3.png")
    (other,) = (out / "pictures").rglob("row-6.png")
    before, after = (hashlib.sha256(each.read_bytes()).hexdigest() for each in (path, other))
    path.write_bytes(other.read_bytes())
    (log,) = (out / "log").iterdir()
    size = len(other.read_bytes())
    told = [json.loads(line) for line in log.read_text().splitlines()]
    told = [
        {**row, "sha256": after, "file_sha256": after, "size": size, "file_size": size}
        if row["sha256"] == before
        else row
        for row in told
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in told))
    code, said = bulk(table, "-o", out, "--batch", "2", "--verify", "7")
    assert code == 1
    assert "row-3: " in said
    assert "pixels differ" in said


def test_a_bucket_holds_what_a_folder_does(bulk, table, bucket, tmp_path, monkeypatch):
    """Over HTTP: rows read from it, pictures written to it, and again only what is missing."""
    import fsspec

    fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    fs.put_file(table, "drawn/in/requests.jsonl")
    for flags in ((), ("--shards", "4")):
        out = f"{bucket}/out{len(flags)}"
        bulk(table, "-o", tmp_path / f"out{len(flags)}", "--batch", "2", *flags)
        code, said = bulk(f"{bucket}/in/*.jsonl", "-o", out, "--batch", "2", *flags)
        assert code == 0, said
        root = out.removeprefix("s3://")
        there = {
            name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root) if "/log/" not in name
        }
        assert there == files(tmp_path / f"out{len(flags)}")
        name = next(each for each in there if each.startswith(("pictures", "shards")))
        fs.rm_file(f"{root}/{name}")
        assert "0 pictures drawn" not in bulk(table, "-o", out, "--batch", "2", *flags)[1]
        assert fs.cat_file(f"{root}/{name}") == there[name]
