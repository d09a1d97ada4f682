"""The whole embedded model in a given time: autoencoder, text encoder, denoiser, and the decoder again.

Each part is trained by its own script, in a process (or several) of its own, so that it can be stopped and
gone on with alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ldm.errors import UserError

# Of the minutes. With --init_from the text encoder is taken over, and its share goes to all.
SHARES = {"vae": 0.25, "clip": 0.05, "unet": 0.62, "decoder": 0.08}


def stages(run_dir: Path, old: Path | None) -> Iterator[tuple[str, str, list[object]]]:
    """Each part, its script and its arguments, in the order in which they need each other."""
    vae, clip = run_dir / "vae" / "export", old or run_dir / "clip" / "export"
    yield "vae", "train_vae.py", ["--widen", old] if old else []
    if not old:
        yield "clip", "train_clip.py", []
    yield "unet", "train_unet.py", ["--vae", vae, "--clip", clip, *(["--init_from", old] if old else [])]
    yield "decoder", "train_vae.py", ["--init_from", vae, "--decoder_only"]


def launcher(processes: int) -> tuple[list[str], dict[str, str]]:
    """How a trainer is started, and its environment."""
    import torch

    if torch.cuda.is_available():
        return [sys.executable], dict(os.environ)
    # On a CPU processes of one thread gain more than threads.
    alone = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    return torchrun, os.environ | alone


def run(command: list[str], environment: dict[str, str]) -> int:
    """A trainer's exit status. After a signal it is waited for while it saves, and the status is not 0."""
    received: list[int] = []
    with subprocess.Popen(command, env=environment) as trainer:

        def pass_on(number: int, _: object) -> None:
            received.append(number)
            if number == signal.SIGTERM:  # the terminal sends Ctrl-C to both
                trainer.terminate()

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        status = trainer.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return status or (128 + received[0] if received else 0)


def assemble(run_dir: Path) -> Path:
    """The denoiser's model with the decoder that was polished last, in bf16."""
    import torch

    from ldm.checkpoint import load_parts, save_folder
    from ldm.pretrain.vae import load_vae

    parts = load_parts(run_dir / "unet" / "export", None)
    polished = replace(parts, vae=load_vae(run_dir / "decoder" / "export"))
    save_folder(run_dir / "model", polished, torch.bfloat16)
    return run_dir / "model"


def train_postcard(
    checkout: Path,
    run_dir: Path,
    minutes: float,
    *,
    init_from: Path | None = None,
    processes: int = 2,
    others: Sequence[str] = (),
) -> int:
    """Train all parts one after the other, each from where it was stopped, if it was.

    Args:
        checkout: where scripts/ and configs/ lie.
        minutes: of training in all; SHARES says of whom.
        init_from: a postcard model to go on from.
        processes: on a CPU, each with a batch of its own.
        others: arguments for each trainer.

    Returns the exit status of the trainer that was stopped or failed, which ends it; 0 if none was.
    Raises UserError if `init_from` is no model folder.
    """
    if init_from and not (init_from / "model_index.json").is_file():
        raise UserError(f"{init_from} is no model folder: it has no model_index.json")
    start, environment = launcher(processes)
    parts = list(stages(run_dir, init_from))
    whole = sum(SHARES[name] for name, _, _ in parts)
    for name, script, arguments in parts:
        share = minutes * SHARES[name] / whole
        print(f"{name}: {share:.1f} minutes", flush=True)
        recipe = ["--config", checkout / "configs" / f"postcard_{name}.yaml", "--run_dir", run_dir / name]
        command = [*start, checkout / "scripts" / script, *recipe, *arguments]
        command += ["--set", f"run.max_minutes={share}", *others]
        if status := run([str(word) for word in command], environment):
            return status
    print(f"the model is in {assemble(run_dir)}")
    return 0
