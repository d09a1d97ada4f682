"""The peak of resident memory that `txt2img --plan` predicts, and that drawing has, in a process of its own.

python scripts/measure_memory.py --cache ~/ldm-shapes >> record.jsonl

Random weights in the shapes of each family are made once in --cache (fp16; SDXL's take 6.5 GiB). One step is
enough for the peak. A case is family:size:batch:dtype, and after another colon a --max-memory.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    *("postcard:128x128:1:fp32", "postcard:256x256:4:fp32", "postcard:128x128:8:bf16"),
    *("sd1:512x512:1:fp32", "sd1:256x256:4:fp32", "sd1:768x512:1:fp32", "sd1:256x256:1:bf16"),
    *("sd2:512x512:1:fp32", "sd2:384x384:2:fp32", "sdxl:256x256:1:bf16"),
)
SIZES = {"MiB": 1, "GiB": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where the folders of weights are")
    parser.add_argument("--case", nargs="+", default=CASES, help="family:size:batch:dtype[:max-memory]")
    args = parser.parse_args()
    for case in args.case:
        figures = measure(args.cache, case) | {"date": time.strftime("%F")}
        print(json.dumps(figures), flush=True)


def measure(cache: Path, case: str) -> dict[str, object]:
    """In MiB: what is predicted, what it took, and the way that was chosen."""
    family, size, batch, dtype, *limit = case.split(":")
    width, height = size.split("x")
    if family != "postcard" and not (cache / family / "model_index.json").exists():
        run(str(ROOT / "tests/make_sd15.py"), str(cache / family), "--family", family)
    model = family if family == "postcard" else str(cache / family)
    flags = ["-m", model, "-p", "a boat at sea", "-W", width, "-H", height, "--n-samples", batch]
    flags += ["--dtype", dtype, "--steps", "1", "--device", "cpu"]
    flags += ["--max-memory", limit[0]] if limit else []
    plan = run("-m", "ldm", "txt2img", *flags, "--plan")
    (way,) = re.findall(r"^fits: ([\w ]+)", plan, re.MULTILINE)
    (peak,) = re.findall(rf"peak, {way} +([\d.]+) (\w+)", plan)
    with tempfile.TemporaryDirectory() as out:
        drawn = run("-m", "ldm", "txt2img", *flags, "--outdir", out, "--skip-grid")
    (took,) = re.findall(r"peak memory (\d+) MiB", drawn)
    predicted = float(peak[0]) * SIZES[peak[1]]
    told = {"case": case, "way": way, "predicted": round(predicted), "measured": int(took)}
    return told | {"ratio": round(predicted / int(took), 3)}


def run(*command: str) -> str:
    """What a Python process prints. Raises CalledProcessError."""
    paths = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    return done.stdout


if __name__ == "__main__":
    main()
