"""Kill `ldm bulk` at random moments, again and again, and see that the same command completes it.

    python scripts/bulk_faults.py --kills 20 --rows 200 --workers 2 --shards 20

One run is left alone. Of another its workers are killed (SIGKILL, some or all) at random moments; after each
kill whatever has a final name is compared with the first run's, byte by byte; at the end all of it is.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THINGS = ("red sailboat", "green car", "yellow duck", "blue tent", "orange balloon", "white rocket")


def files(out: Path) -> dict[str, bytes]:
    found = [path for path in out.rglob("*") if path.is_file()]
    kept = [path for path in found if not {"log", ".work"} & {*path.relative_to(out).parts}]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in kept}


def start(table: Path, out: Path, args: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "ldm", "bulk", str(table), "-o", str(out), "-q", "--threads", "1"]
    command += ["--shards", str(args.shards)] if args.shards else []
    ranks = [["--rank", str(rank), "--world", str(args.workers)] for rank in range(args.workers)]
    return [subprocess.Popen(command + rank) for rank in ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=0, help="rows of a shard; 0: files")
    args = parser.parse_args()
    moments, folder = random.Random(0), Path(tempfile.mkdtemp())
    table, whole, killed = folder / "requests.jsonl", folder / "whole", folder / "killed"
    rows = [{"id": f"r{k}", "prompt": f"a {THINGS[k % 6]} at sea", "steps": 2} for k in range(args.rows)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    began = time.monotonic()
    assert [process.wait() for process in start(table, whole, args)] == [0] * args.workers
    longest, right = time.monotonic() - began, files(whole)
    for kill in range(args.kills):
        workers = start(table, killed, args)
        time.sleep(moments.uniform(0, longest * 1.2 / max(1, args.kills / 8)))
        for process in moments.sample(workers, moments.randint(1, len(workers))):
            process.kill()
        for process in workers:
            process.wait()
        there = files(killed)
        assert [name for name, data in there.items() if data != right[name]] == [], "a file is not whole"
        print(f"kill {kill + 1}: {len(there)} of {len(right)} files are there, all whole", flush=True)
    assert [process.wait() for process in start(table, killed, args)] == [0] * args.workers
    assert files(killed) == right, "the runs differ"
    print(f"{len(right)} files, equal to those of the run that was left alone, byte by byte")


if __name__ == "__main__":
    main()
