"""Train the whole embedded model in a given time: autoencoder, text encoder, denoiser, and the decoder again.

python scripts/train_postcard.py --minutes 150 --run_dir runs/postcard [--init_from weights/postcard]

Uses a GPU if there is one, else a process for each core. Run it again to go on where it was stopped. What
each part has learnt so far is in <run_dir>/<part>/export; the model, when all is done, in <run_dir>/model.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Of the minutes. With --init_from the text encoder is taken over, and the denoiser has its share.
SHARES = {"vae": 0.25, "clip": 0.05, "unet": 0.62, "decoder": 0.08}


def stages(args: argparse.Namespace) -> dict[str, list[str]]:
    """Each part's script with its arguments, in the order in which they need each other."""
    runs, old = args.run_dir, args.init_from
    vae = runs / "vae" / "export"
    decoder = ROOT / "configs" / "postcard_decoder.yaml"
    clip = old or runs / "clip" / "export"
    parts = {
        "vae": ["train_vae.py", *(["--widen", old / "vae"] if old else [])],
        "clip": ["train_clip.py"],
        "unet": ["train_unet.py", "--vae", vae, "--clip", clip, *(["--init_from", old] if old else [])],
        "decoder": ["train_vae.py", "--config", decoder, "--init_from", vae, "--decoder_only"],
    }
    if old:
        del parts["clip"]
    return {name: [str(word) for word in command] for name, command in parts.items()}


def launcher() -> tuple[list[str], dict[str, str]]:
    """How a trainer is started, and its environment: one process on a GPU, else one for each core."""
    import torch

    if torch.cuda.is_available():
        return [sys.executable], dict(os.environ)
    import psutil

    cores = str(psutil.cpu_count(logical=False) or 1)
    alone = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}  # threads gain less than processes here
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", cores]
    return torchrun, os.environ | alone


def assemble(run_dir: Path) -> Path:
    """The denoiser's model with the decoder that was polished last, in bf16."""
    import torch

    from ldm.checkpoint import load_parts, save_folder
    from ldm.train.vae import load_vae

    parts = load_parts(run_dir / "unet" / "export", None)
    polished = replace(parts, vae=load_vae(run_dir / "decoder" / "export"))
    save_folder(run_dir / "model", polished, torch.bfloat16)
    return run_dir / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="of training in all")
    parser.add_argument("--run_dir", type=Path, required=True, help="everything goes here")
    parser.add_argument("--init_from", type=Path, help="a postcard model to go on from")
    args, more = parser.parse_known_args()
    start, environment = launcher()
    parts = stages(args)
    whole = sum(SHARES[name] for name in parts)
    for name, (script, *arguments) in parts.items():
        minutes = args.minutes * SHARES[name] / whole
        command = [*start, str(ROOT / "scripts" / script), "--run_dir", str(args.run_dir / name), *arguments]
        print(f"{name}: {minutes:.1f} minutes", flush=True)
        done = subprocess.run(
            [*command, "--set", f"run.max_minutes={minutes}", *more], env=environment, cwd=ROOT
        )
        if done.returncode:
            sys.exit(done.returncode)
    print(f"the model is in {assemble(args.run_dir)}")


if __name__ == "__main__":
    main()
