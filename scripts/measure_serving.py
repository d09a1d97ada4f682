"""What `ldm serve` costs a picture of the embedded model, and what requests gain that wait together."""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

URL = "http://127.0.0.1:8797"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
prompts = (f"a red car on the beach, {number}" for number in count())


def ask(path: str, body: dict[str, object] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)


def draw(prompt: str) -> Any:
    return ask("/v1/images/generations", {"prompt": prompt, "size": "128x128"})


def timed(call: Any, given: str) -> float:
    start = time.perf_counter()
    call(given)
    return time.perf_counter() - start


def together(waiting: int) -> float:
    """Seconds a picture, of so many that wait while another is drawn."""
    with ThreadPoolExecutor(waiting + 1) as pool:
        list(pool.map(draw, [next(prompts) for _ in range(waiting + 1)]))
    last = ask(f"/api/jobs?limit={waiting}")["jobs"]
    return float(max(job["finished"] for job in last) - min(job["started"] for job in last)) / waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    import ldm

    pipe, rows = ldm.load(), list[dict[str, float]]()
    command = [sys.executable, "-m", "ldm", "serve", "--port", URL.rpartition(":")[2], "--quiet"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, cwd=folder))
        stack.callback(server.terminate)  # whatever goes wrong: Popen's own end waits for it
        while server.poll() is None and not rows:
            with contextlib.suppress(OSError):  # until it has read the model
                rows.append({"first": timed(draw, next(prompts))})
        for _ in range(rounds):
            row = {"call": timed(pipe, next(prompts)), "one by one": timed(draw, next(prompts))}
            rows.append(row | {f"{waiting} waiting": together(waiting) for waiting in (2, 4, 8)})
    middle = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[-1]}
    for name, seconds in middle.items():
        print(f"{name:10} {seconds:.3f} s a picture, {middle['one by one'] / seconds:.2f} x one by one")


if __name__ == "__main__":
    main()
