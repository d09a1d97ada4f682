"""scripts/bench.py: ratios, the table, peers that are missing or fail, memory that runs short."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from benchmark import measure as measuring  # noqa: E402
from benchmark import processes as process_module  # noqa: E402
from benchmark.case import ROWS, Case  # noqa: E402
from benchmark.measure import measure  # noqa: E402
from benchmark.peers.base import Peer  # noqa: E402
from benchmark.processes import Failed, Processes  # noqa: E402
from benchmark.report import table_lines, write_report  # noqa: E402
from benchmark.results import Measured, Results, lines  # noqa: E402

TOLD = {
    "command": "python scripts/bench.py",
    "date": "2026-11-28 12:00",
    "rounds": 3,
    "processor": {"name": "A | B", "cores": 2, "units": ["avx2"]},
    "memory_gib": 24.0,
    "versions": {"ldm": "abc"},
}


def seconds(peer, *values, **others):
    return Measured("unet", peer, [{"s": value} for value in values], **others)


class Fake(Peer):
    """A peer of which no process is ever made."""

    rows = ("unet", "text")

    def __init__(self, library, modules=()):
        super().__init__("fp32")
        object.__setattr__(self, "library", library)
        object.__setattr__(self, "modules", dict.fromkeys(modules, library))


@pytest.fixture
def case(tmp_path):
    (tmp_path / "made").mkdir()
    return Case("made", str(tmp_path), str(tmp_path), 128, 128, 8)


def test_a_ratio_is_the_median_of_those_of_rounds_that_were_run_together():
    # The machine slows down by the round; ours is always twice as quick.
    ours, theirs = seconds("ldm-fp32", 1, 9, 3, 2, 8), seconds("peer-fp32", 2, 18, 6, 4, 16)
    found = {line.peer: line for line in lines([ours, theirs])}
    assert found["peer-fp32"].ratio == 0.5
    assert (found["peer-fp32"].median, found["peer-fp32"].least, found["peer-fp32"].most) == (6, 2, 18)
    assert found["ldm-fp32"].ratio is None
    # Rounds go their own ways: the ratio of the medians would be 1.
    mixed = lines([seconds("ldm-fp32", 1, 2, 3), seconds("peer-fp32", 2, 1, 6)])
    assert (mixed[1].ratio, mixed[1].ratio_least, mixed[1].ratio_most) == (0.5, 0.5, 2.0)
    # One stopped early: there are no pairs.
    assert lines([seconds("ldm-fp32", 1, 2, 3), seconds("peer-fp32", 4)])[1].ratio == 0.5


def test_ratios_are_to_the_first_of_ours_that_ran():
    rows = [
        Measured("unet", "ldm-bf16", failed="failed"),
        seconds("ldm-fp32", 3.0),
        seconds("ldm-compiled-fp32", 1.5),
        seconds("peer", 6.0),
    ]
    assert [line.ratio for line in lines(rows)] == [None, 2.0, 0.5]
    assert [line.ratio for line in lines([seconds("a", 1.0), seconds("b", 2.0)])] == [None, None]


def test_the_table_tells_what_each_could_not_do():
    rows = [
        seconds("ldm-fp32", 1.0, 1.5, 2.0, first_s=12.3, error=2e-6),
        seconds("peer-fp32", 2.0, 3.0, 4.0),
        Measured("unet", "absent-fp32", failed="not installed: pip install absent"),
    ]
    assert list(table_lines(rows)) == [
        "| U-Net call with guidance (batch 2) | ldm-fp32 | 1.5 s | 1 to 2 |  | 2.0e-06 | 12.3 s |",
        "|  | peer-fp32 | 3 s | 2 to 4 | 0.50 |  |  |",
        "| U-Net call with guidance (batch 2) | absent-fp32 | not installed: pip install absent | | | | |",
    ]
    alone = [Measured("unet", "absent-fp32", failed="not installed: pip install a|b")]
    (line,) = table_lines(alone)
    assert line.startswith(
        "| U-Net call with guidance (batch 2) | absent-fp32 | not installed: pip install a/b |"
    )


def test_memory_has_lines_and_ratios_of_its_own():
    ours = Measured("cold", "ldm-fp32", [{"s": 2.0, "peak_mib": 500.0}])
    theirs = Measured("cold", "peer-fp32", [{"s": 4.0, "peak_mib": 400.0}])
    untold = Measured("cold", "other-fp32", [{"s": 4.0, "peak_mib": float("nan")}])  # as on Windows
    found = [(line.figure, line.peer, line.unit, line.ratio) for line in lines([ours, theirs, untold])]
    assert found == [
        ("s", "ldm-fp32", "s", None),
        ("s", "peer-fp32", "s", 0.5),
        ("s", "other-fp32", "s", 0.5),
        ("peak_mib", "ldm-fp32", "MiB", None),
        ("peak_mib", "peer-fp32", "MiB", 1.25),
    ]


def test_the_report_is_a_page_a_chart_and_all_rounds(tmp_path, case):
    measured = [seconds("ldm-fp32", 1.0, 1.0, error=float("nan")), seconds("peer-fp32", 4.0, 2.0)]
    results = Results(case, measured, {"peer-fp32": 14.2}, "peer-fp32")
    page = write_report(tmp_path / "new", "now", TOLD, [results]).read_text("utf-8")
    assert "| ours / it |" in page
    assert "![ours / theirs by row and peer](now-made.svg)" in page
    assert "Errors are relative to peer-fp32." in page
    assert "peer-fp32's networks, 14 s." in page
    read = json.loads((tmp_path / "new" / "now.json").read_text("utf-8"))
    assert read["models"][0]["measured"][1]["rounds"] == [{"s": 4.0}, {"s": 2.0}]
    assert read["models"][0]["measured"][0]["error"] is None  # JSON has no NaN
    assert "| another shape |" in page
    svg = ElementTree.parse(tmp_path / "new" / "now-made.svg").getroot()
    assert "unet: peer-fp32" in [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.38" in page  # of 0.25 and 0.5


class Turns:
    """In the place of `Processes`: answers with what was computed, and writes down who was asked when."""

    def __init__(self, folder):
        self.asked = asked

    def run(self, peer, case, row, k, save):
        self.asked.append((row.name, k, peer.name))
        if peer.name == "broken-fp32" and k == 2:
            raise Failed("out of memory")
        if k == 0:
            np.save(save, np.full((1, 4), {"ldm-fp32": 1.1}.get(peer.name, 1.0), np.float32))
        return {"s": float(k), "first_s": 9.0, "peak_mib": 1.0}

    def close(self):
        pass


asked = []


def test_peers_take_turns_and_one_that_fails_ends_nothing(monkeypatch, case):
    monkeypatch.setattr(measuring, "Processes", Turns)
    asked.clear()
    peers = [
        Fake("ldm"),
        Fake("diffusers"),
        Fake("broken"),
        Fake("absent", modules=["no_such_module"]),
    ]
    told, kept = [], []
    results = measure(
        case, ["unet", "text"], peers, 3, told.append, lambda now: kept.append(len(now.measured))
    )
    by_key = {(each.row, each.peer): each for each in results.measured}
    assert kept == [4, 8]  # each row is kept when it is there
    for row in ("unet", "text"):
        assert [each["s"] for each in by_key[row, "ldm-fp32"].rounds] == [1, 2, 3]  # without the first, 0
        assert by_key[row, "ldm-fp32"].first_s == 9.0
        assert by_key[row, "ldm-fp32"].error == pytest.approx(0.1, abs=1e-6)
        assert by_key[row, "diffusers-fp32"].error is None  # itself the reference
        assert by_key[row, "broken-fp32"].failed == "failed: out of memory"
        assert [each["s"] for each in by_key[row, "broken-fp32"].rounds] == [1]
        assert by_key[row, "absent-fp32"].failed == "not installed: pip install absent"
    unet = [(k, peer) for row, k, peer in asked if row == "unet"]
    assert [k for k, _ in unet] == sorted(k for k, _ in unet)  # round by round
    for k, count in enumerate((3, 3, 3, 2)):
        assert len({peer for round_, peer in unet if round_ == k}) == count


class Child:
    """In the place of a process that holds `holds` MiB: new, it must make a row ready first."""

    made, closed = [], []

    def __init__(self, peer, case, log):
        self.peer, self.ready = peer, False
        self.made.append(peer)

    def ask(self, row, k, save=None):
        ready, self.ready = (0.0 if self.ready else 5.0), True
        return {"s": 1.0 if not ready else 100.0, "ready_s": ready, "peak_mib": 4000.0}

    def close(self):
        self.closed.append(self.peer)


def test_a_process_makes_room_for_another_and_comes_back_warm(monkeypatch, case, tmp_path):
    alive = Processes(tmp_path)
    with (tmp_path / "weights.safetensors").open("wb") as file:
        file.truncate(800 * 2**20)  # in fp32 five times as much is thought to be needed

    class Memory:
        @property
        def available(self):
            return (10_000 - 4000 * len(alive.alive)) * 2**20

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    monkeypatch.setattr(process_module, "Process", Child)
    Child.made.clear(), Child.closed.clear()
    peers, row = [Fake("a"), Fake("b"), Fake("c")], ROWS["unet"]
    times = {k: [alive.run(peer, case, row, k, tmp_path / "x.npy") for peer in peers] for k in range(3)}
    assert [each["first_s"] for each in times[0]] == [105.0] * 3
    assert Child.closed[:1] == ["a-fp32"]  # two have room: the third sends away who was asked first
    assert Child.made.count("a-fp32") > 1
    assert all(each["s"] == 1.0 for k in (1, 2) for each in times[k])  # never the call that warms up
    alive.close()
    assert sorted(Child.closed) == sorted(Child.made)


@pytest.mark.slow
def test_all_of_it_on_a_tiny_model(tiny_folder, tmp_path):
    command = [sys.executable, "scripts/bench.py", "--models", tiny_folder, "--out", tmp_path / "out"]
    command += ["--cache", tmp_path / "cache", "--name", "now", "--rounds", "1", "--threads", "1"]
    command += ["--steps", "2", "--batch", "2", "--peers", "ldm-fp32", "diffusers-fp32", "--rows"]
    rows = ["unet", "decode", "encode", "text", "picture", "batch", "cold", "load"]
    subprocess.run([*map(str, command), *rows], cwd=ROOT, check=True)
    (model,) = json.loads((tmp_path / "out" / "now.json").read_text("utf-8"))["models"]
    assert [each["failed"] for each in model["measured"]] == [""] * 16
    assert all(len(each["rounds"]) == 1 for each in model["measured"])
    errors = {each["row"]: each["error"] for each in model["measured"] if each["peer"] == "ldm-fp32"}
    assert all(errors[row] < 1e-4 for row in rows[:6])
