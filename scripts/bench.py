"""Drawing, loading and training side by side with diffusers.

python scripts/bench.py --model weights/postcard --steps 10      both draw in the same process, in turn
python scripts/bench.py load --model FOLDER --dtype bf16         each loads in a new process, in turn
python scripts/bench.py train --batch 4                          each fine-tunes in a new process, in turn

The tables give medians and their ratio. `cold` is a whole `txt2img` in a new process, from the shell to the
written PNG. Loading is measured from after the imports on, the files being in the page cache; memory is
Linux's (/proc): anonymous when the model is there, resident at the peak, both beyond what the imports took.
`bench_train.py` says what is trained.

The benchmarks are programs, not entry points: what they do is of use to nobody who installs ldm, so it lies
here and not in the package.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_train
from bench_common import in_new_process, resident

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


def load(args: argparse.Namespace) -> None:
    """Each peer in turn, in processes of their own."""
    for file in args.model.rglob("*.safetensors"):
        file.read_bytes()  # into the page cache
    found: dict[str, list[dict[str, float]]] = {"ldm": [], "diffusers": []}
    for _ in range(args.repeats):
        for peer in found:
            figures = in_new_process("load", peer, "--dtype", args.dtype, "--model", args.model)
            found[peer].append(figures)
    size = found["ldm"][0]["weights_mib"]
    print(f"weights in {args.dtype}: {size:.0f} MiB\n")
    print("| load | ldm | diffusers | ratio | best ratio |\n|---|---|---|---|---|")
    for name in ("imports_s", "load_s", "load_cpu_s", "anonymous_mib", "peak_mib"):
        ours, theirs = ([run[name] for run in found[peer]] for peer in found)
        a, b = statistics.median(ours), statistics.median(theirs)
        print(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.2f} | {min(ours) / min(theirs):.2f} |")
        if name.endswith("mib"):
            print(f"| {name} per weight | {a / size:.3f} | {b / size:.3f} | | |")


def load_once(args: argparse.Namespace) -> None:
    """Load with one peer, and print what it took as JSON."""
    start = time.perf_counter()
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    pipe: Any
    if args.peer == "ldm":
        import transformers.models.clip.modeling_clip  # noqa: F401
        import transformers.models.clip.tokenization_clip  # noqa: F401

        import ldm.pipeline

        make = partial(ldm.load, args.model, device="cpu", dtype=args.dtype)
    else:
        from diffusers import StableDiffusionPipeline

        make = partial(StableDiffusionPipeline.from_pretrained, args.model, torch_dtype=dtype)
    imported, cpu, before = time.perf_counter(), time.process_time(), resident()
    pipe = make()
    loaded, after = time.perf_counter(), resident()
    modules = (pipe.unet, pipe.vae, getattr(pipe, "parts", pipe).text_encoder)
    size = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    figures = {
        "imports_s": imported - start,
        "load_s": loaded - imported,
        "load_cpu_s": time.process_time() - cpu,
        "anonymous_mib": after["RssAnon"] - before["RssAnon"],
        "peak_mib": after["VmHWM"] - before["VmRSS"],
        "weights_mib": size / 2**20,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("draw", "load", "train"), default="draw")
    parser.add_argument("--model", type=Path, default=Path("weights/postcard"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="to load in")
    parser.add_argument("--batch", type=int, default=4, help="pictures in a step of training")
    parser.add_argument(
        "--rows", choices=bench_train.ROWS, nargs="+", default=bench_train.ROWS, help="to train"
    )
    parser.add_argument("--peer", choices=("ldm", "diffusers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "load":
        (load_once if args.peer else load)(args)
        return
    if args.what == "train":
        (bench_train.measure if args.peer else bench_train.compare)(args)
        return
    print("| seconds per picture | ldm | diffusers | ratio |\n|---|---|---|---|")
    for name in DTYPES:
        warm(args, name)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ldm", "txt2img", "-p", PROMPT, "--outdir", folder, "--quiet"]
        cold = seconds(lambda: subprocess.run([*command, "--model", str(args.model)], check=True), 3)
    print(f"| cold txt2img, default settings | {cold:.2f} | | |")


if __name__ == "__main__":
    main()
