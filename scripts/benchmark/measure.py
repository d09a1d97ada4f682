"""Peers take turns: the rounds of the rows of one model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.case import ROWS, Case, Row
from benchmark.inputs import relative_error
from benchmark.peers.base import Peer
from benchmark.processes import Failed, Processes, command, once, temporary_folder, timed
from benchmark.results import Measured, Results

Told = Callable[[str], None]
# Whose output errors are of: the first that is there. Training has no output, load none.
REFERENCES = ("diffusers-fp32", "ldm-fp32")


def measure(
    case: Case,
    rows: Sequence[str],
    peers: Sequence[Peer],
    rounds: int,
    tell: Told = print,
    after_row: Callable[[Results], object] = lambda results: None,
) -> Results:
    """All rows on a case. Whatever a peer cannot do is told in its place, and never ends the benchmark.

    Args:
        after_row: is called with what there is so far, so that nothing is lost if a later row is ended.
    """
    results = Results(case)
    with temporary_folder() as folder:
        usable, lacking = _made_ready(results, peers, Path(folder), tell)
        results.reference = next((each for each in REFERENCES if each in [p.name for p in usable]), "")
        for file in case.files():
            _into_page_cache(file)
        processes = Processes(Path(folder))
        try:
            for name in rows:
                turn = Turn(case, ROWS[name], rounds, processes, Path(folder), tell)
                measured = turn.all_rounds([peer for peer in usable if name in peer.rows])
                turn.compare(measured, results.reference)
                measured += [Measured(name, peer, failed=why) for peer, why in lacking.items()]
                results.measured += measured
                after_row(results)
        finally:
            processes.close()
    return results


def _into_page_cache(file: Path) -> None:
    """Piece by piece: the peak of a parent's memory is counted among its children's."""
    with file.open("rb", buffering=0) as stream:
        while stream.read(2**24):
            pass


def _made_ready(
    results: Results, peers: Sequence[Peer], folder: Path, tell: Told
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be measured, and by name why others cannot. What they need is made, and timed."""
    usable, lacking, case = list[Peer](), dict[str, str](), results.case
    record = case.made / "made.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for peer in peers:
        why = peer.lacks(case)
        if not why and peer.unmade(case):
            tell(f"{case.model}: {peer.name}: converting, once")
            try:
                seconds = once("make", peer.name, case, folder, folder / "make.log")["s"]
            except Failed as error:
                why = f"converting failed: {error}"
            else:
                made[peer.name] = made.get(peer.name, 0) + seconds
                record.write_text(json.dumps(made), encoding="utf-8")
        if why:
            lacking[peer.name] = why
            tell(f"{case.model}: {peer.name}: {why}")
        else:
            usable.append(peer)
    results.made_s = {peer.name: made[peer.name] for peer in usable if peer.name in made}
    return usable, lacking


class Turn:
    """A row: round after round, in each of which every peer runs once, in an order that changes."""

    def __init__(
        self, case: Case, row: Row, rounds: int, processes: Processes, folder: Path, tell: Told
    ) -> None:
        self.case, self.row, self.rounds, self.processes = case, row, rounds, processes
        self.folder, self.tell = folder, tell

    def all_rounds(self, peers: Sequence[Peer]) -> list[Measured]:
        """Round 0 warms up, caches of the file system and of compilers too; it is not among the figures."""
        measured = {peer.name: Measured(self.row.name, peer.name) for peer in peers}
        order, rng = list(peers), random.Random(0)
        for k in range(self.rounds + 1):
            for peer in [each for each in order if not measured[each.name].failed]:
                self._one(peer, k, measured[peer.name])
            rng.shuffle(order)
        return list(measured.values())

    def _one(self, peer: Peer, k: int, measured: Measured) -> None:
        try:
            if self.row.fresh:
                answer = self._fresh(peer, k)
            else:
                answer = self.processes.run(peer, self.case, self.row, k, self._output(peer.name))
        except Failed as error:
            measured.failed = f"failed: {error}"
            self.tell(f"{self.case.model}: {self.row.name}: {peer.name}: {measured.failed}")
            return
        if k == 0:
            measured.first_s, measured.threads = answer.get("first_s"), answer.get("threads")
        else:
            measured.rounds.append({name: answer[name] for name in self.row.figures if name in answer})
        round_ = f"round {k} of {self.rounds}" if k else "warmed up"
        self.tell(f"{self.case.model}: {self.row.name}: {peer.name}: {round_}: {answer['s']:.3f} s")

    def _fresh(self, peer: Peer, k: int) -> dict[str, Any]:
        """A process of its own."""
        log = self.folder / f"{peer.name}-{self.row.name}.log"
        if self.row.name == "load":
            return once("load", peer.name, self.case, self.folder, log)
        png = self.folder / f"{peer.name}-{k}.png"
        line = peer.cold_command(self.case, png) or command("cold", peer.name, self.case, png)
        figures = timed(line, log)
        if not png.exists():
            raise Failed("no picture was written")
        return figures

    def compare(self, measured: Sequence[Measured], reference: str) -> None:
        """The error of each output against the reference's, both of round 0 and so of the same prompt."""
        if not self._output(reference).exists():
            return
        wanted = np.load(self._output(reference))
        for each in measured:
            file = self._output(each.peer)
            if file.exists() and each.peer != reference and not each.peer.startswith("sdcpp"):
                each.error = relative_error(np.load(file), wanted)

    def _output(self, peer: str) -> Path:
        return self.folder / f"{peer}-{self.row.name}.npy"
