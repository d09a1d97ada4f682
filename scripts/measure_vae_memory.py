"""Memory and time of Stable Diffusion's VAE (random weights) on a CPU, whole or over bands of rows.

python scripts/measure_vae_memory.py --size 1024 --dtype fp32 bf16
python scripts/measure_vae_memory.py --size 4096 --dtype bf16 --what decode --memory 5 --out record.json

Each figure is of a process of its own. Memory is the resident peak beyond what was there with the weights.
Without --memory both ways are measured, and the bands hold what is quickest.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="sides in pixels")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), nargs="+", default=["fp32"])
    parser.add_argument("--what", choices=("decode", "encode"), nargs="+", default=["decode", "encode"])
    parser.add_argument("--memory", type=float, nargs="+", help="GiB that are said to be free")
    parser.add_argument("--out", type=Path, help="JSON to write, a line for each figure")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    for case in itertools.product(args.what, args.dtype, args.size, args.memory or (1e9, 0)):
        command = [sys.executable, __file__, "--one", *map(str, case)]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def measure(what: str, dtype: str, size: str, memory: str) -> dict[str, object]:
    """What one call takes, in MiB and seconds of the processor."""
    import torch
    from bench_common import resident

    from ldm.models import build, vae_bands
    from ldm.runtime import choose

    torch.manual_seed(0)
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    runtime, side = choose("cpu", dtype), int(size)
    vae = runtime.place(build(config))
    shape = (1, 4, side // 8, side // 8) if what == "decode" else (1, 3, side, side)
    given = torch.rand(shape).to(runtime.dtype, memory_format=torch.channels_last)
    before, cpu, start = resident()["VmRSS"], time.process_time(), time.perf_counter()
    with torch.inference_mode():
        getattr(vae_bands, what)(vae, given, float(memory) * 2**30)
    figures = {"mib": resident()["VmHWM"] - before, "cpu_s": time.process_time() - cpu}
    figures |= {"s": time.perf_counter() - start, "threads": torch.get_num_threads()}
    told = {
        "what": what,
        "dtype": dtype,
        "size": side,
        "free_gib": float(memory),
        "date": time.strftime("%F"),
    }
    return told | {name: round(value, 1) for name, value in figures.items()} | {"cpus": os.cpu_count()}


if __name__ == "__main__":
    main()
