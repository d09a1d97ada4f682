"""Engines share out a run: what comes of it is, byte for byte, what one process writes."""

import os
import re
import signal
import sys
from functools import partial

import cloudpickle
import pytest

from ldm.bulk import on_slurm
from ldm.errors import UserError

# What engines call is sent to other processes, which cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
LOCAL = ("--engine", "slurm", "--slurm", "cluster=local")
DEBUG = ("--engine", "slurm", "--slurm", "cluster=debug")


def files(out):
    """All that a run leaves, by name, but for logs and what was at work."""
    paths = [path for path in out.rglob("*") if path.is_file() and not {"log", ".work"} & set(path.parts)]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def one(bulk, table, tmp_path):
    """What one process writes, in batches of two."""
    code, said = bulk(table, "-o", tmp_path / "one", "--batch", "2", "--threads", "1")
    assert code == 0, said
    written = files(tmp_path / "one")
    assert len(written) == 7 + 3  # and run.json, manifest.parquet, failed.parquet
    return written


@pytest.fixture
def engine(bulk, table, tmp_path):
    """The same by an engine, into `out`."""
    return lambda *flags: bulk(table, "-o", tmp_path / "out", "--batch", "2", "--threads", "1", *flags)


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_jobs_of_slurm_write_what_one_process_does(engine, one, tmp_path, workers):
    code, said = engine(*DEBUG, "--workers", workers)
    assert code == 0, said
    assert "7 pictures drawn, 0 were there" in said
    assert files(tmp_path / "out") == one
    (tmp_path / "out" / "pictures" / "00000" / "row-4.png").unlink()
    assert "1 picture drawn, 6 were there" in engine(*DEBUG, "--workers", workers)[1]
    assert files(tmp_path / "out") == one


@pytest.mark.slow
def test_tasks_of_a_job_are_processes_and_ranks(engine, one, tmp_path):
    code, said = engine(*LOCAL, "tasks_per_node=2")
    assert code == 0, said
    assert files(tmp_path / "out") == one
    assert {path.name for path in (tmp_path / "out" / ".work").iterdir()} == {
        "engine",
        "rank-0",
        "rank-1",
        "slurm",
    }


def test_what_a_rank_finds_wrong_is_said_once_and_by_the_command(engine):
    assert engine("--rank", "0", "--world", "2")[0] == 0
    code, said = engine(*DEBUG, "--workers", "2", "--format", "webp")
    assert code == 2
    assert "was begun with format" in said
    assert "(1 more like it)" in said
    assert "Traceback" not in said


def dies(rank, world):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return ""


@pytest.mark.slow
def test_a_job_that_is_killed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"job \d+ ended early: .*err says why; the same command goes on"):
        list(on_slurm.draw(dies, 2, tmp_path / "jobs", {"cluster": "local"}))


def test_a_job_that_is_preempted_is_handed_in_as_it_was():
    ranks = on_slurm.Ranks(partial(dies, 0), 1, 4)
    assert ranks.checkpoint().function == ranks


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--engine", "slurm", "--slurm", "cluster=moon"), "--slurm: AutoExecutor doesn't know"),
        ((*DEBUG, "colour=red"), "--slurm: .*colour"),
        (("--engine", "ray", "--verify"), "leave --verify, --rank and --world out"),
        (("--engine", "slurm", "--rank", "0", "--world", "2"), "leave --verify, --rank and --world out"),
        (("--workers", "0"), "0 is not a number from 1 up"),
        (("--workers", "9-3"), "9-3 is not a number from 1 up, nor two such as 1-64"),
        (("--slurm", "gpus"), "gpus has no value"),
    ],
)
def test_what_is_wrong_is_one_line(engine, capsys, flags, message):
    try:
        code, said = engine(*flags)
    except SystemExit as left:  # argparse's way
        code, said = left.code, capsys.readouterr().err
    assert code == 2
    (line,) = said.splitlines()
    assert re.search(message, line)


@pytest.mark.parametrize(("engine_", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_is_said(engine, monkeypatch, engine_, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, said = engine("--engine", engine_)
    assert code == 2
    assert f"--engine {engine_} needs {package}: pip install 'ldm[{engine_}]'" in said
    assert len(said.splitlines()) == 1


# --- Ray Data ----------------------------------------------------------------------------------------------


@pytest.fixture
def ray():
    return pytest.importorskip("ray")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [(), ("--shards", "4")])
def test_actors_of_ray_write_what_one_process_does(ray, bulk, table, engine, tmp_path, shards):
    bulk(table, "-o", tmp_path / "one", "--batch", "2", "--threads", "1", *shards)
    code, said = engine("--engine", "ray", "--workers", "2", *shards)
    assert code == 0, said
    assert "7 pictures drawn, 0 were there" in said
    assert files(tmp_path / "out") == files(tmp_path / "one")
    assert "0 pictures drawn, 7 were there" in engine("--engine", "ray", *shards)[1]
    (lost, *_) = sorted(name for name in files(tmp_path / "one") if name.startswith(("pictures", "shards")))
    (tmp_path / "out" / lost).unlink()
    assert engine("--engine", "ray", *shards)[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.slow
def test_what_an_actor_finds_wrong_is_one_line(ray, engine):
    assert engine("--rank", "0", "--world", "2")[0] == 0
    code, said = engine("--engine", "ray", "--format", "webp")
    assert code == 2
    assert "was begun with format" in said
    assert "Traceback" not in said
    assert not ray.is_initialized()


def test_a_cluster_that_does_not_answer_is_one_line(ray, engine, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, said = engine("--engine", "ray")
    assert code == 2
    assert "no cluster of Ray" in said
