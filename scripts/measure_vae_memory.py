"""Memory and time of Stable Diffusion's VAE (random weights) on a CPU, whole or over bands of rows.

python scripts/measure_vae_memory.py --size 1024 --dtype fp32 bf16
python scripts/measure_vae_memory.py --size 4096 --dtype bf16 --what decode --memory 5 --out record.jsonl

Each figure is of a process of its own. Memory is the resident peak beyond what was there with the weights.
Without --memory both ways are measured, the bands in the least memory.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
BLOCKS = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--size", type=int, nargs="+", default=[512], help="sides in pixels")
    add("--dtype", choices=("bf16", "fp16", "fp32"), nargs="+", default=["fp32"])
    add("--what", choices=("decode", "encode"), nargs="+", default=["decode", "encode"])
    add("--memory", type=float, nargs="+", default=[1e9, 0], help="GiB that are said to be free")
    add("--out", type=Path, help="a file to which each figure is added, a line of JSON")
    add("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    for case in itertools.product(args.what, args.dtype, args.size, args.memory):
        command = [sys.executable, __file__, "--one", *map(str, case)]
        line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def measure(what: str, dtype: str, size: str, memory: str) -> dict[str, object]:
    """What one call takes, in MiB and seconds."""
    import torch
    from benchmark.memory import resident

    from ldm.models import AutoencoderKL, vae_bands
    from ldm.runtime import choose

    config = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    config |= {f"{way}_block_types": (block,) * 4 for way, block in BLOCKS.items()}
    runtime, side = choose("cpu", dtype), int(size)
    vae = runtime.place(AutoencoderKL.from_config(config))
    shape = (1, 4, side // 8, side // 8) if what == "decode" else (1, 3, side, side)
    given = torch.rand(shape).to(runtime.dtype, memory_format=torch.channels_last)
    before, cpu, start = resident()["VmRSS"], time.process_time(), time.perf_counter()
    with torch.inference_mode():
        getattr(vae_bands, what)(vae, given, float(memory) * 2**30)
    figures = {"mib": resident()["VmHWM"] - before, "cpu_s": time.process_time() - cpu}
    figures |= {"s": time.perf_counter() - start, "threads": torch.get_num_threads()}
    told = {"what": what, "dtype": dtype, "size": side, "free_gib": float(memory)}
    return told | {name: round(x, 1) for name, x in figures.items()} | {"date": time.strftime("%F")}


if __name__ == "__main__":
    main()
