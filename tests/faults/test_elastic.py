"""A worker that is lost under torchrun: the run goes on by itself, from the last state."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_finetune import result
from tiny_training import child, two_processes

from ldm.train.state import newest_state

OPTIONS = {"steps": 12, "checkpointing_steps": 4, "validation_steps": 6, "logging_steps": 2}
WORKER = """
import os, signal, sys
from pathlib import Path
from tiny_training import Line, tiny_recipe
from ldm.train.loop import train

forward = Line.forward

def dying(task, batch):
    print(f"made {task.calls + 1}", flush=True)
    if task.calls == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(task, batch)

if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Line.forward = dying
    train(Line(), tiny_recipe(distributed="fsdp", **OPTIONS), Path(sys.argv[1]))
""".replace("OPTIONS", repr(OPTIONS))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_lost_worker_costs_at_most_the_steps_since_the_last_state(tmp_path):
    whole, run_dir, script = tmp_path / "whole", tmp_path / "run", tmp_path / "worker.py"
    whole.mkdir()

    def call(rank, port):
        return child, (whole,), OPTIONS | {"rank": rank, "port": port, "distributed": "fsdp"}

    assert two_processes(call) == [0, 0], (whole / "output-0.txt").read_text()
    script.write_text(WORKER, encoding="utf-8")
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(run_dir)],
        env=os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
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
