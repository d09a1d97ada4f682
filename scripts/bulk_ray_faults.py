"""Kill actors and drivers of `ldm bulk --engine ray` at random moments: the same command completes the run.

    python scripts/bulk_ray_faults.py --kills 10 --rows 200

One run is of one process. Of another, by two actors, one actor is killed (SIGKILL), and later its driver;
whatever has a final name is compared with the first run's, byte by byte. At the end it is left alone.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from bulk_faults import files

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def actors(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(driver.pid).children(recursive=True)
    return [each for each in children if "MapWorker" in "".join(each.cmdline()[:1])]


def main() -> None:
    from ldm.bulk.measuring import write_table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of a driver, each after one of an actor")
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    moments, folder = random.Random(0), Path(tempfile.mkdtemp())
    table, whole, killed = folder / "requests.jsonl", folder / "whole", folder / "killed"
    write_table(table, args.rows, steps=2)
    command = [sys.executable, "-m", "ldm", "bulk", str(table), "-q", "--threads", "1", "-o"]
    subprocess.run([*command, str(whole)], check=True)
    right, by_ray = files(whole), [*command, str(killed), "--engine", "ray", "--workers", "2"]
    for kill in range(args.kills):
        driver = subprocess.Popen(by_ray)
        while not actors(driver) and driver.poll() is None:
            time.sleep(0.5)
        time.sleep(moments.uniform(0, 20))
        for actor in moments.sample(actors(driver), 1) if driver.poll() is None else ():
            actor.kill()
        time.sleep(moments.uniform(0, 20))
        left = actors(driver) if driver.poll() is None else []
        driver.kill()
        code = driver.wait()
        _, alive = psutil.wait_procs(left, timeout=120)
        assert not alive, f"the driver has left actors behind: {alive}"
        there = files(killed)
        assert [name for name, data in there.items() if data != right[name]] == [], "a file is not whole"
        print(
            f"kill {kill + 1} ({code}): {len(there)} of {len(right)} files are there, all whole", flush=True
        )
    subprocess.run(by_ray, check=True)
    assert files(killed) == right, "the runs differ"
    print(f"{len(right)} files, equal to those of one process, byte by byte")


if __name__ == "__main__":
    main()
