"""Fine-tuning of tiny models on tiny pictures, as `ldm finetune` does it, also in processes of its own."""

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from processes import two_processes
from safetensors import safe_open

from ldm.cli import main
from ldm.train.state import newest_state

CLOCK = ("minutes", "samples_per_s", "memory_gb")
QUICK = {
    "resolution": 64,
    "mixed_precision": "no",
    "max_train_steps": 2,
    "num_validation_images": 1,
    "validation_inference_steps": 1,
    "validation_prompts": "red boat",
    "logging_steps": 1,
    "validation_steps": 100,
    "learning_rate": 1e-3,
}
WORD = {"mode": "textual_inversion", "placeholder_token": "<it>", "initializer_token": "boat"}


def write_pictures(folder: Path, count: int = 6, words: str = "red boat, sea, number") -> Path:
    """Pictures of noise of three shapes, each with a caption beside it."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        shape = ((64, 64, 3), (64, 96, 3), (80, 56, 3))[i % 3]
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{words} {i}")
    return folder


def arguments(model: Path, data: Path, output: Path, **options) -> list[str]:
    """The command line; True and False are flags, and None leaves out what is quick otherwise."""
    given = {"model": model, "train_data_dir": data, "output_dir": output} | QUICK | options
    argv = ["finetune"]
    for name, value in given.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            argv += [f"--{name}", *(str(each) for each in values)]
    return argv


def run(model: Path, data: Path, output: Path, **options) -> int:
    """`ldm finetune` in this process; its exit code."""
    return main(arguments(model, data, output, **options))


def hashes(folder: Path) -> dict[str, str]:
    """Of every file below it, and the names of empty folders."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def contents(folder: Path) -> dict[str, object]:
    """Of every file below it: of safetensors what is in it, as the order of its metadata is any."""
    found: dict[str, object] = dict(hashes(folder))
    for name in found:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, "pt") as file:
                tensors = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
                found[name] = tensors, file.metadata()
    return found


def result(output: Path) -> dict[str, object]:
    """All that a run leaves and that no clock gives: its last state's tensors, log, pictures and exports."""
    state = newest_state(output)
    assert state is not None
    files = json.loads((state / "manifest.json").read_text())["files"]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": state.name,
        "tensors": {name: each["sha256"] for name, each in files.items() if name.endswith("safetensors")},
        "log": [{k: v for k, v in row.items() if k not in CLOCK} for row in rows],
        "export": contents(output / "export"),
        "grids": hashes(output / "grids"),
    }


def interrupted(forward, call: int):
    """`forward` of a task, in whose `call`th call, from 1 on, SIGTERM comes to this process."""
    calls = 0

    def counted(task, batch):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(task, batch)

    return counted


# --- in processes of their own ---------------------------------------------------------------------------


def child(argv, log: Path, rank: int = 0, port: int = 0, call: int = 0) -> None:
    """`ldm` in this process, as one of two where there is a port; SIGTERM comes in the `call`th forward."""
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if port:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    note_and_interrupt(log.with_suffix(".names"), call)
    code = main(argv)
    if port and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    raise SystemExit(code)


def note_and_interrupt(names: Path, call: int) -> None:
    """Have the task write down the pictures of each of its batches, and SIGTERM come in one of them."""
    from ldm.finetune.task import FinetuneTask

    interrupt, batch_of = interrupted(FinetuneTask.forward, call), FinetuneTask.batch

    def noted(task, rng, size, number):
        batch = batch_of(task, rng, size, number)
        with names.open("a", encoding="utf-8") as file:
            file.write(f"{number} {' '.join(Path(name).name for name in task.names(batch))}\n")
        return batch

    FinetuneTask.forward, FinetuneTask.batch = interrupt, noted


def both(run_dir: Path, argv, calls=(0, 0)) -> list[int]:
    """Run it in two processes over gloo, as torchrun would start them; their exit statuses."""
    run_dir.mkdir(parents=True, exist_ok=True)

    def call(rank, port):
        return child, (argv, run_dir / f"output-{rank}.txt", rank, port, calls[rank]), {}

    return two_processes(call, 90)
