"""Processes that measure, as seen from outside: one for each peer and model, kept while memory allows.

What measures imports no torch here: a child's peak of memory counts what its parent had when it was made.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from benchmark.case import Case, Row
from benchmark.peers.base import Peer

BENCH = Path(__file__).parents[1] / "bench.py"
SPARE_MIB = 1500  # for the system
FIRST_GUESS = {"fp32": 5.0, "int8": 4.0}  # resident at most, of the weights on disk (fp16): until it is known
OTHER_GUESS = 3.0


class Failed(Exception):
    """A peer could not do it; says why in a line."""


class Process:
    """A peer that answers."""

    def __init__(self, peer: str, case: Case, log: Path) -> None:
        self.log: IO[str] = log.open("w+", encoding="utf-8", errors="replace")
        self.child = subprocess.Popen(
            command("serve", peer, case),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(),
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises Failed with what the peer raised, or how its process ended."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise Failed(ended(self.child.wait(), self.log))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        self.child.wait()
        self.log.close()


class Processes:
    """Those of one case, one for each peer: made when first asked, ended when another needs its memory.

    A peer that was ended is made anew on its next turn, and its first call then counts for nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alive: dict[tuple[str, str], Process] = {}  # the one that was asked last is last
        self.peaks: dict[tuple[str, str], float] = {}  # MiB

    def run(self, peer: Peer, case: Case, row: Row, k: int, save: Path) -> dict[str, Any]:
        """Round k of a row; its output goes to `save` in round 0, which warms up. Raises Failed.

        "first_s" of round 0 is what it took with all that came before: imports, loading, compiling.
        """
        key, first = (peer.name, row.name if row.apart else ""), None
        process = self.alive.pop(key, None)
        if process is None:
            guess = case.size_mib * FIRST_GUESS.get(peer.dtype, OTHER_GUESS)
            self._make_room(self.peaks.get(key, guess))
            process = Process(peer.name, case, self.folder / f"{peer.name}.log")
        try:
            answer = process.ask(row=row.name, k=k, save=str(save) if k == 0 else None)
            if answer["ready_s"] > 1e-3 and k > 0:  # of a process that is new, or made ready for another row
                answer = process.ask(row=row.name, k=k)
            elif k == 0:
                first = answer["ready_s"] + answer["s"]
        except Failed:
            process.close()
            raise
        self.alive[key] = process
        self.peaks[key] = max(self.peaks.get(key, 0), answer["peak_mib"])
        return answer if first is None else {**answer, "first_s": first}

    def _make_room(self, needed: float) -> None:
        import psutil

        while self.alive and psutil.virtual_memory().available / 2**20 < needed + SPARE_MIB:
            oldest = next(iter(self.alive))
            self.alive.pop(oldest).close()

    def close(self) -> None:
        """End all."""
        while self.alive:
            self.alive.popitem()[1].close()


def once(what: str, peer: str, case: Case, path: Path, log: Path) -> dict[str, Any]:
    """What a process of its own answers in its only line. Raises Failed."""
    with log.open("w+", encoding="utf-8", errors="replace") as errors:
        done = subprocess.run(
            command(what, peer, case, path),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(),
        )
        if done.returncode:
            raise Failed(ended(done.returncode, errors))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def timed(line: list[str], log: Path) -> dict[str, float]:
    """Seconds and MiB of a command, from its start to its end. Raises Failed."""
    with log.open("w+", encoding="utf-8", errors="replace") as errors:
        start, cwd = time.perf_counter(), BENCH.parents[1]
        child = subprocess.Popen(line, stdout=errors, stderr=errors, env=environment(), cwd=cwd)
        peak = math.nan
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        else:
            child.wait()
        seconds = time.perf_counter() - start
        if child.returncode:
            raise Failed(ended(child.returncode, errors))
    return {"s": seconds, "peak_mib": peak}


def command(what: str, peer: str, case: Case, path: Path | None = None) -> list[str]:
    line = [sys.executable, str(BENCH), "--inside", what, "--peer", peer, "--case", case.to_json()]
    return line if path is None else [*line, "--path", str(path)]


def environment() -> dict[str, str]:
    """Ours, with this checkout's ldm first, and compiled modules kept, as where it is installed."""
    paths = [str(BENCH.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    return {**os.environ, **changed, "PYTHONDONTWRITEBYTECODE": ""}


def ended(code: int, log: IO[str]) -> str:
    """How a process ended, in a line: its last words, or the signal."""
    log.seek(0)
    words = [line.strip() for line in log.read().splitlines() if line.strip()]
    errors = [line for line in words if re.match(r"[\w.]+(Error|Exception)\b", line)] or words
    said = errors[-1][:300] if errors else ""
    if code < 0:
        hint = ", perhaps as memory ran out" if code == -9 else ""
        return f"its process was ended by signal {-code}{hint}"
    return said or f"its process ended with status {code}"


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """For logs, pictures and what is compared."""
    return tempfile.TemporaryDirectory(prefix="ldm-bench-", ignore_cleanup_errors=True)
