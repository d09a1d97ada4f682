"""The model of bulk drawing beside real runs: `python scripts/check_simulation.py --workers 1 2 4`.

Ranks of one thread each draw a table; what their logs say of batches goes into the model, and its time to
finish stands beside theirs. More ranks than processors slow each other down, which their logs hold.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    print("| ranks | pictures/s | seconds | simulated |\n|--:|--:|--:|--:|")
    with reported():
        for workers in args.workers:
            print(_row(args, workers), flush=True)


def _row(args: argparse.Namespace, workers: int) -> str:
    from ldm.bulk import measuring
    from ldm.bulk.run import Order

    with tempfile.TemporaryDirectory() as folder:
        table, out = Path(folder) / "requests.jsonl", Path(folder) / "out"
        measuring.write_table(table, args.rows, args.steps)
        command = [sys.executable, "-m", "ldm", "bulk", str(table), "-o", str(out), "-q", "--threads", "1"]
        command += ["--batch", str(args.batch), "--world", str(workers)]
        began = time.time()
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], cwd=ROOT) for rank in range(workers)]
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * workers, codes
        times = measuring.batch_times(out, Order((str(table),), str(out), args.batch).plan())
    seconds, simulated = measuring.checked(times, began, shared=False)
    speed = args.rows / seconds
    return f"| {workers} | {speed:.3g} | {seconds:.1f} | {mean(simulated):.1f} +- {stdev(simulated):.1f} |"


if __name__ == "__main__":
    main()
