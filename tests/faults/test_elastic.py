"""A worker, or a node, that is lost under torchrun: the run goes on by itself, from the last state."""

import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from processes import two_processes
from tiny_finetune import result
from tiny_training import Line, child, exported, tiny_recipe

from ldm.train.loop import train
from ldm.train.state import newest_state

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")]
OPTIONS = {"steps": 12, "checkpointing_steps": 4, "validation_steps": 6, "logging_steps": 2}
WORKER = """
import os, signal, sys, time
from pathlib import Path
from tiny_training import Line, tiny_recipe
from ldm.train.loop import train

forward = Line.forward

def dying(task, batch):
    print(f"made {task.calls + 1}", flush=True)
    if task.calls == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(task, batch)

def slow(task, batch):
    time.sleep(0.5)
    return forward(task, batch)

if __name__ == "__main__":
    if sys.argv[2] == "slow":
        Line.forward = slow
    elif os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Line.forward = dying
    train(Line(), tiny_recipe(distributed="fsdp", **OPTIONS), Path(sys.argv[1]))
""".replace("OPTIONS", repr(OPTIONS))


def launched(folder: Path, how: str, *options: str) -> list[str]:
    """The command that starts WORKER, in folder/run."""
    script = folder / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    return [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(folder / "run"), how]


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))
    own = {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # Else workers that start again may read the addresses of those that are gone (docs/many.md).
    return os.environ | own | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_a_lost_worker_costs_at_most_the_steps_since_the_last_state(tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    whole.mkdir()

    def call(rank, port):
        return child, (whole,), OPTIONS | {"rank": rank, "port": port, "distributed": "fsdp"}

    assert two_processes(call) == [0, 0], (whole / "output-0.txt").read_text()
    done = subprocess.run(
        launched(tmp_path, "dying", "--standalone", "--nproc-per-node=2", "--max-restarts=1"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("made ") == 11  # it died in the eleventh step
    assert f"going on from {run_dir / 'state-00000008'}" in done.stdout
    assert newest_state(run_dir).name == "state-00000012"
    assert result(run_dir) == result(whole)


def test_a_lost_node_leaves_its_batches_to_the_others(tmp_path):
    """Of two nodes one is killed with all that runs on it; the other makes the same steps alone."""
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    meet = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=x")
    command = launched(tmp_path, "slow", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", *meet)
    with (tmp_path / "first.txt").open("w") as said:
        first = subprocess.Popen(command, env=environment(), stdout=said, stderr=subprocess.STDOUT)
    time.sleep(5)  # the first one is where the others meet
    second = psutil.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while newest_state(tmp_path / "run") is None and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in [*second.children(recursive=True), second]:
            process.kill()
        assert first.wait(300) == 0, (tmp_path / "first.txt").read_text()[-3000:]
    finally:
        first.kill()
        second.kill()
        first.wait()
        second.wait()
    assert "run.processes 2 -> 1" in (tmp_path / "first.txt").read_text()
    train(Line(), tiny_recipe(parts=2, **OPTIONS), tmp_path / "alone")
    ours, theirs = exported(tmp_path / "run"), exported(tmp_path / "alone")
    assert all(float((ours[name] - t).norm() / t.norm()) < 1e-6 for name, t in theirs.items())
