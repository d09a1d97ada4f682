"""Train the whole embedded model in a given time: autoencoder, text encoder, denoiser, and the decoder again.

python scripts/train_postcard.py --minutes 150 --run_dir runs/postcard [--init_from weights/postcard]

Uses a GPU if there is one, else two processes on the CPU. Run it again to go on where it was stopped. What
each part has learnt so far is in <run_dir>/<part>/export; the model, when all is done, in <run_dir>/model.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import UserError, reported

ROOT = Path(__file__).resolve().parents[1]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other arguments (--set, --train_data_dir) go to each trainer.",
    )
    parser.add_argument("--minutes", type=float, required=True, help="of training in all")
    parser.add_argument("--run_dir", type=Path, required=True, help="everything goes here")
    parser.add_argument("--init_from", type=Path, help="a postcard model to go on from")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="on a CPU; each has a batch of its own (default: %(default)s)",
    )
    args, others = parser.parse_known_args()
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes must be above 0 (got {args.minutes:g})")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1 (got {args.processes})")
    with reported(training=True):
        train_all(args, others)


def train_all(args: argparse.Namespace, others: list[str]) -> None:
    if args.init_from and not (args.init_from / "model_index.json").is_file():
        raise UserError(f"{args.init_from} is no model folder: it has no model_index.json")
    start, environment = launcher(args.processes)
    parts = list(stages(args.run_dir, args.init_from))
    whole = sum(SHARES[name] for name, _, _ in parts)
    for name, script, arguments in parts:
        minutes = args.minutes * SHARES[name] / whole
        print(f"{name}: {minutes:.1f} minutes", flush=True)
        where = ["--config", ROOT / "configs" / f"postcard_{name}.yaml", "--run_dir", args.run_dir / name]
        command = [
            *start,
            ROOT / "scripts" / script,
            *where,
            *arguments,
            "--set",
            f"run.max_minutes={minutes}",
        ]
        if status := run([str(word) for word in command] + others, environment):
            sys.exit(status)
    print(f"the model is in {assemble(args.run_dir)}")


if __name__ == "__main__":
    main()
