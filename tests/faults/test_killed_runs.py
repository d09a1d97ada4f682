"""Runs that are killed at any moment go on as if nothing had happened; two processes, too."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from processes import forked, kill_before, two_processes
from safetensors.torch import load_file
from tiny_training import child

from ldm.train import state as checkpoint
from ldm.train.state import damage, newest_state

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
LOCAL = ("minutes", "samples_per_s", "memory_gb")


def ended(run_dir: Path, **options) -> int:
    """Train in a process of its own; its exit status."""
    run_dir.mkdir(exist_ok=True)
    process = forked().Process(target=child, args=(run_dir,), kwargs=options)
    process.start()
    process.join()
    return process.exitcode


def result(run_dir: Path) -> tuple[dict, list]:
    """Hashes of the last state's tensors, and the log without what a clock or the system gives."""
    files = json.loads((newest_state(run_dir) / "manifest.json").read_text())["files"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tensors = {name: entry["sha256"] for name, entry in files.items() if name.endswith("safetensors")}
    return tensors, [{k: v for k, v in row.items() if k not in LOCAL} for row in rows]


def check_states(run_dir: Path) -> None:
    """Whatever is named as a state is whole."""
    assert [(path.name, damage(path)) for path in run_dir.glob("state-*") if damage(path)] == []


# --- kill -9 ---------------------------------------------------------------------------------------------


def killed_at_random(tmp_path: Path, kills: int, **options) -> int:
    """Kill a run `kills` times and let it end; how many kills came while a state was being written."""
    began = time.monotonic()
    assert ended(tmp_path / "whole", **options) == 0
    longest = (time.monotonic() - began) * 1.5 / kills
    run_dir, moments, writing = tmp_path / "killed", random.Random(0), 0
    run_dir.mkdir()
    for _ in range(kills):
        ready = forked().Event()
        process = forked().Process(target=child, args=(run_dir, ready), kwargs=options)
        process.start()
        assert ready.wait(60)
        time.sleep(moments.uniform(0, longest))
        process.kill()
        process.join()
        check_states(run_dir)
        writing += any(not path.name.endswith("old") for path in run_dir.glob(".state-*"))
    assert ended(run_dir, **options) == 0, (run_dir / "output-0.txt").read_text()
    assert result(run_dir) == result(tmp_path / "whole")
    return writing


def test_killed_at_five_random_moments(tmp_path):
    killed_at_random(
        tmp_path, 5, steps=24, parts=2, checkpointing_steps=1, logging_steps=7, validation_steps=9
    )


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path):
    writing = killed_at_random(
        tmp_path, 50, steps=400, parts=2, checkpointing_steps=1, logging_steps=7, validation_steps=90
    )
    print(f"{writing} of 50 kills came while a state was being written")
    assert writing >= 5


def kill_at(call: int) -> None:
    """SIGKILL this process before its `call`th write, flush, renaming or removal of a file."""
    places = (
        *((checkpoint, name) for name in ("write_tensors", "write_json")),
        *((os, name) for name in ("fsync", "unlink", "rmdir")),
        (Path, "rename"),
        (shutil, "rmtree"),
    )
    kill_before(call, places)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_change_of_the_disk(tmp_path, stride):
    """A save that takes an older state's place: killed before any part of it."""
    options = {"steps": 2, "checkpointing_steps": 1, "validation_steps": 2, "logging_steps": 1}
    assert ended(tmp_path / "first", interrupt=1, **options) == 0
    first = newest_state(tmp_path / "first").name
    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    assert ended(tmp_path / "whole", **options) == 0
    for call in range(1, 100, stride):
        run_dir = tmp_path / str(call)
        shutil.copytree(tmp_path / "first", run_dir)
        status = ended(run_dir, sabotage=(kill_at, call), **options)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        check_states(run_dir)
        assert newest_state(run_dir).name >= first
        assert ended(run_dir, **options) == 0, (run_dir / "output-0.txt").read_text()
        assert result(run_dir) == result(tmp_path / "whole")
        assert not list(run_dir.glob(".state-*"))
    assert 20 < call < 95


def test_the_lock_of_a_killed_run_holds_nobody_and_that_of_a_live_one_does(tmp_path):
    ready, options = forked().Event(), {"steps": 10**6, "logging_steps": 10}
    process = forked().Process(target=child, args=(tmp_path, ready), kwargs=options)
    process.start()
    while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.01)
    assert ended(tmp_path, rank=1, steps=10) == 2
    said = (tmp_path / "output-1.txt").read_text()
    assert f"error: {tmp_path} is in use by process {process.pid} on {socket.gethostname()} since" in said
    process.kill()
    process.join()
    assert ended(tmp_path, rank=2, steps=10) == 0


# --- two processes ---------------------------------------------------------------------------------------


def both(run_dir: Path, interrupts=(0, 0), **options) -> list[int]:
    """Train in two processes over gloo, as torchrun would start them; their exit statuses."""
    run_dir.mkdir(exist_ok=True)
    return two_processes(
        lambda rank, port: (
            child,
            (run_dir,),
            options | {"rank": rank, "port": port, "interrupt": interrupts[rank]},
        )
    )


def test_two_processes_stopped_inside_accumulation_go_on_bit_for_bit(tmp_path):
    options = {"steps": 6, "parts": 3, "checkpointing_steps": 4, "validation_steps": 3, "logging_steps": 2}
    assert both(tmp_path / "whole", **options) == [0, 0]
    batches = [load_file(tmp_path / "whole" / f"batch-{rank}.safetensors")["x"] for rank in (0, 1)]
    assert not torch.equal(*batches)

    # In the second part of the third step, a signal comes to one of them; later to the other.
    assert both(tmp_path / "parts", interrupts=(0, 8), **options) == [0, 0]
    assert newest_state(tmp_path / "parts").name == "state-00000002"
    assert both(tmp_path / "parts", interrupts=(5, 0), **options) == [0, 0]
    assert newest_state(tmp_path / "parts").name == "state-00000003"
    assert both(tmp_path / "parts", **options) == [0, 0]
    assert result(tmp_path / "parts") == result(tmp_path / "whole")

    # One process takes all six batches of a step; seven would be another training.
    assert ended(tmp_path / "parts", rank=3, **options | {"steps": 7}) == 0
    assert "run.processes 2 -> 1" in (tmp_path / "parts" / "output-3.txt").read_text()
    assert ended(tmp_path / "parts", rank=3, **options | {"steps": 8, "parts": 7}) == 2
    said = (tmp_path / "parts" / "output-3.txt").read_text()
    assert "another recipe: optimiser.gradient_accumulation_steps 3 -> 7;" in said


def test_a_fault_of_the_main_process_ends_both_and_is_said_once(tmp_path):
    options = {"steps": 4, "checkpointing_steps": 2}
    assert both(tmp_path, **options) == [0, 0]
    (newest_state(tmp_path) / "weights.safetensors").unlink()
    assert both(tmp_path, **options) == [2, 2]
    assert "no state is whole" in (tmp_path / "output-0.txt").read_text()
    assert "error" not in (tmp_path / "output-1.txt").read_text()


@pytest.mark.slow
def test_torchrun_sends_on_the_signal_and_both_processes_save(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import torch
        from tiny_training import Line, tiny_recipe, train
        train(Line(), tiny_recipe(int(sys.argv[1]), parts=3, logging_steps=1), Path(sys.argv[2]))
        torch.distributed.destroy_process_group()
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run_dir = tmp_path / "parts"
    process = subprocess.Popen([*command, "400", run_dir], env=environment)
    while not (run_dir / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait()
    stopped = newest_state(run_dir)
    assert stopped is not None
    assert stopped.name < "state-00000400"
    subprocess.run([*command, "400", run_dir], env=environment, check=True)
    subprocess.run([*command, "400", tmp_path / "whole"], env=environment, check=True)
    assert result(run_dir) == result(tmp_path / "whole")
