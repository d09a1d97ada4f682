"""Bulk drawing that is killed, or whose disk is full, at any moment: the same command completes it.

Nothing is lost, nothing doubled, and whatever has a final name is whole.
"""

import errno
import os
import random
import signal
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from bulk_rows import ROWS, write_jsonl
from processes import forked, kill_before
from pyarrow import parquet

from ldm.bulk import storage, worker
from ldm.cli import main

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
STRIDE = 13  # of 44 and 27 changes of the disk: each kill at another point of a file's way
KINDS = [(), ("--shards", "4")]


def child(argv, ready=None, kill_at=0):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if kill_at:
        die_at(kill_at)
    if ready is not None:
        ready.set()
    raise SystemExit(main(argv))


def started(argv, **options):
    process = forked().Process(target=child, args=(argv,), kwargs=options)
    process.start()
    return process


def ended(argv, **options):
    process = started(argv, **options)
    process.join()
    return process.exitcode


def die_at(call):
    """SIGKILL this process before its `call`th change of the disk."""
    places = (
        (storage, "flush"),
        (os, "link"),
        (os, "fsync"),
        (Path, "replace"),
        (Path, "write_bytes"),
        (worker, "add_row"),
    )
    kill_before(call, places)


def files(out):
    """Whatever has a final name."""
    found = [path for path in out.rglob("*") if path.is_file()]
    kept = [path for path in found if not {"log", ".work"} & {*path.relative_to(out).parts}]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in kept}


def arguments(model, folder, name, *flags, times=1):
    """What draws `times` as many rows as ROWS to a folder of that name."""
    rows = [{**row, "id": f"{k}-{row['id']}"} for k in range(times) for row in ROWS]
    table = write_jsonl(folder / f"requests-{times}.jsonl", rows)
    own = ["-m", str(model), "--dtype", "fp32", "--batch", "2", "-q"]
    return ["bulk", table, "-o", str(folder / name), *own, *flags]


@pytest.fixture
def command(tiny_folder, tmp_path):
    return partial(arguments, tiny_folder, tmp_path)


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """(flags, times) -> the files of a run that nothing disturbs, drawn once."""

    @cache
    def drawn(*flags, times=1):
        folder = tmp_path_factory.mktemp("whole")
        assert main(arguments(tiny_folder, folder, "out", *flags, times=times)) == 0
        return files(folder / "out")

    return drawn


def check_whole(out, whole):
    there = files(out) if out.exists() else {}
    assert {name for name, data in there.items() if data != whole[name]} == set()
    return len(there)


@pytest.mark.parametrize("shards", KINDS)
@pytest.mark.parametrize(("kills", "times"), [(3, 2), pytest.param(20, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(command, tmp_path, shards, kills, times):
    first = forked().Process(target=int)  # from here on they start at once
    first.start()
    first.join()
    began = time.monotonic()
    assert ended(command("whole", *shards, times=times)) == 0
    longest, moments = (time.monotonic() - began) * 3 / kills, random.Random(0)
    whole, found = files(tmp_path / "whole"), []
    for _ in range(kills):
        ready = forked().Event()
        process = started(command("killed", *shards, times=times), ready=ready)
        assert ready.wait(60)
        time.sleep(moments.uniform(0.2, 0.7) * longest)
        process.kill()
        process.join()
        found.append(check_whole(tmp_path / "killed", whole))
    print(f"files after each kill: {found} of {len(whole)}")
    assert found == sorted(found)
    assert ended(command("killed", *shards, times=times)) == 0
    assert files(tmp_path / "killed") == whole
    ids = [row["id"] for row in parquet.read_table(tmp_path / "killed" / "manifest.parquet").to_pylist()]
    assert len(ids) == len(set(ids)) == 7 * times
    assert list((tmp_path / "killed" / ".work").rglob("*.tmp")) == []


@pytest.mark.parametrize("shards", KINDS)
@pytest.mark.parametrize("stride", [STRIDE, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_change_of_the_disk(command, whole, tmp_path, shards, stride):
    call = 1
    while ended(command(f"killed-{call}", *shards), kill_at=call) == -signal.SIGKILL:
        check_whole(tmp_path / f"killed-{call}", whole(*shards))
        assert ended(command(f"killed-{call}", *shards)) == 0
        assert files(tmp_path / f"killed-{call}") == whole(*shards)
        call += stride
    assert call > stride


def test_one_of_two_workers_is_killed(command, whole, tmp_path):
    """The other goes on, and a third, alone, ends it all."""
    ready = [forked().Event() for _ in range(2)]
    both = [
        started(command("two", "--rank", str(rank), "--world", "2"), ready=ready[rank]) for rank in (0, 1)
    ]
    assert all(each.wait(60) for each in ready)
    time.sleep(0.3)
    both[1].kill()
    for process in both:
        process.join()
    assert both[0].exitcode == 0
    assert ended(command("two")) == 0
    assert files(tmp_path / "two") == whole()


class FullDisk:
    """A disk on which the writes from the n-th on leave half of a file, until there is room again."""

    def __init__(self, monkeypatch, first):
        self.left, self.write = first, Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: self.some(path, data))

    def some(self, path, data):
        self.left -= 1
        if self.left > 0:
            return self.write(path, data)
        self.write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("first", [1, 5, 10])
def test_a_full_disk(command, whole, tmp_path, first, monkeypatch, capsys):
    expected = whole()
    with monkeypatch.context() as patch:
        FullDisk(patch, first)
        assert main(command("full")) == 2
    assert "No space left on device" in capsys.readouterr().err
    check_whole(tmp_path / "full", expected)
    assert main(command("full")) == 0
    assert files(tmp_path / "full") == expected


def test_a_log_that_ends_in_half_a_line(command, whole, tmp_path):
    """As a kill or a full disk leaves it: what it says of others counts."""
    assert main(command("out")) == 0
    (log,) = (tmp_path / "out" / "log").iterdir()
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert main(command("out")) == 0
    assert files(tmp_path / "out") == whole()
    told = [each.read_bytes() for each in (tmp_path / "out" / "log").iterdir()]
    assert sum(data.count(b"\n") for data in told) == 3 + 4


def test_a_rank_is_one_process(command, tmp_path):
    store = storage.open_storage(str(tmp_path / "out"), "rank-0")
    with store.claimed():
        process = started(command("out"))
        process.join()
        assert process.exitcode == 2
        assert main(command("out", "--rank", "1", "--world", "2")) == 0
    assert main(command("out")) == 0
