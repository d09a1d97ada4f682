"""Time drawing side by side with diffusers: `python scripts/bench.py --model weights/postcard --steps 10`.

Both draw with the same weights in the same process, in turn; the table gives medians and their ratio. `cold`
is a whole `txt2img` in a new process, from the shell to the written PNG.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT = "a red sailboat on a calm sea at sunset"
DTYPES = ("bf16", "fp32")


def seconds(draw: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        draw()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def warm(args: argparse.Namespace, name: str) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    import ldm

    ours = ldm.load(args.model, device="cpu", dtype=name)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    theirs = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    theirs.set_progress_bar_config(disable=True)
    for batch in args.batches:
        common: dict[str, Any] = {
            "num_inference_steps": args.steps,
            "guidance_scale": 4.0,
            "num_images_per_prompt": batch,
        }
        a = seconds(partial(ours, PROMPT, seed=0, **common), args.repeats) / batch
        b = seconds(partial(theirs, PROMPT, **common), args.repeats) / batch
        print(f"| {name}, batch {batch} | {a:.3f} | {b:.3f} | {b / a:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("weights/postcard"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    print("| seconds per picture | ldm | diffusers | ratio |\n|---|---|---|---|")
    for name in DTYPES:
        warm(args, name)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ldm", "txt2img", "-p", PROMPT, "--outdir", folder, "--quiet"]
        cold = seconds(lambda: subprocess.run([*command, "--model", str(args.model)], check=True), 3)
    print(f"| cold txt2img, default settings | {cold:.2f} | | |")


if __name__ == "__main__":
    main()
