"""The inside of a process that measures one peer: `bench.py --inside WHAT --peer NAME --case JSON`.

WHAT is "serve" (answer requests, a line of JSON each), "folder", "make", "cold" or "load" (once, and end).
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.case import MODELS, Case
from benchmark.memory import resident
from benchmark.peers import peers_on
from benchmark.peers.base import Opened, Peer, Run


def main(what: str, peer: str, case: Case, path: Path) -> None:
    """`path`: where a folder, a PNG, or nothing is written."""
    # Libraries print what they like: answers keep the standard output, all else goes to the standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if what == "folder":
        from benchmark.folders import make_folder

        make_folder(MODELS[case.model].family, path)
        answers.write("{}\n")
    elif what == "serve":
        Server(peers_on(case.device)[peer], case).serve(answers)
    else:
        once = {"make": make, "cold": cold, "load": load}[what]
        answers.write(json.dumps(once(peers_on(case.device)[peer], case, path)) + "\n")
    answers.flush()


def make(peer: Peer, case: Case, path: Path) -> dict[str, float]:
    start = time.perf_counter()
    peer.make(case)
    return {"s": time.perf_counter() - start}


def cold(peer: Peer, case: Case, path: Path) -> dict[str, float]:
    """Draw one picture into a file. Its time is taken by who starts this process."""
    from PIL import Image

    pixels = to_array(open_with_threads(peer, case).ready("picture")(0))[0]
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)
    return {}


def load(peer: Peer, case: Case, path: Path) -> dict[str, float]:
    """What imports take, and then loading; the files are in the page cache already."""
    start = time.perf_counter()
    opened = open_with_threads(peer, case)
    imported, cpu, before = time.perf_counter(), time.process_time(), resident()
    weights = opened.load()
    seconds, processor, after = time.perf_counter() - imported, time.process_time() - cpu, resident()
    figures = {
        "s": seconds,
        "imports_s": imported - start,
        "cpu_s": processor,
        "anonymous_mib": after["RssAnon"] - before["RssAnon"],
        "peak_mib": after["VmHWM"] - before["VmRSS"],
    }
    return figures if weights is None else {**figures, "weights_mib": weights}


class Server:
    """Makes rows ready and runs them when asked, one request and one answer a line."""

    def __init__(self, peer: Peer, case: Case) -> None:
        self.peer, self.case = peer, case
        self.opened: Opened | None = None
        self.runs: dict[str, Run] = {}

    def serve(self, answers: Any) -> None:
        """Until the standard input ends."""
        for line in sys.stdin:
            try:
                answer = self.answer(**json.loads(line))
            except Exception as error:  # whatever a library raises: the others go on
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    def answer(self, row: str, k: int, save: str | None = None) -> dict[str, Any]:
        """Round k of a row, which is made ready before its first; `save`: a file for what it computes.

        "s" is of the round alone, "ready_s" of imports, loading and compiling, where this was needed.
        """
        start = time.perf_counter()
        if self.opened is None:
            self.opened = open_with_threads(self.peer, self.case)
        if row not in self.runs:
            self.runs = {row: self.opened.ready(row)}
        ready = time.perf_counter()
        self._on_gpu("reset_peak_memory_stats")
        output = self.runs[row](k)
        self._on_gpu("synchronize")
        answer = {"s": time.perf_counter() - ready, "ready_s": ready - start}
        if (peak := self._on_gpu("max_memory_allocated")) is not None:
            answer["gpu_mib"] = peak / 2**20
        answer["peak_mib"] = resident()["VmHWM"] if Path("/proc/self/status").exists() else float("nan")
        if save is not None and output is not None:
            np.save(save, to_array(output))
        return answer | {"threads": threads()}

    def _on_gpu(self, call: str) -> Any:
        if not self.case.device.startswith("cuda"):
            return None
        import torch

        return getattr(torch.cuda, call)()


def open_with_threads(peer: Peer, case: Case) -> Opened:
    """The peer, imported; torch with as many threads as the case says."""
    if case.threads is not None:
        import torch

        torch.set_num_threads(case.threads)
    return peer.start(case)


def threads() -> int | None:
    """Of torch, where it is there."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def to_array(output: Any) -> Any:
    """fp32 [...] of an array, of a tensor anywhere, or of several along the batch."""
    if isinstance(output, list):
        return np.concatenate([to_array(each) for each in output])
    if hasattr(output, "detach"):
        output = output.detach().float().cpu().numpy()
    return np.asarray(output, np.float32)
