"""From measurements of one process to a table of many."""

import json
from dataclasses import asdict, replace

import pytest

from ldm.bulk.capacity import (
    WAYS,
    Assumed,
    Measured,
    pictures_per_second,
    read_measured,
    row,
    shares,
    speeds,
    sweep,
)
from ldm.errors import UserError

MEASURED = Measured("a model", batch=10, service=(4.0, 6.0), start=10.0, write=(0.1,), dispatch=0.25)
CALM = Assumed(life=1e12, slow=0.0, apart=0.0, latency=0.0, rate=1e12, connections=10)


def test_what_was_measured_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(asdict(MEASURED)), encoding="utf-8")
    assert read_measured(path) == MEASURED
    path.write_text(json.dumps({**asdict(MEASURED), "service": [1, "quick"]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"measured\.json: service\.1: .*number"):
        read_measured(path)
    with pytest.raises(UserError, match=r"cannot read .*other"):
        read_measured(tmp_path / "other.json")


def test_without_trouble_each_way_is_as_quick_as_its_parts_say():
    outcomes = sweep(20_000, [1, 4], MEASURED, CALM, seed=1)
    assert list(outcomes) == list(WAYS)
    for name, line in outcomes.items():
        for workers, outcome in zip((1, 4), line, strict=True):
            # A batch: 5 seconds on average, ten pictures saved at once. A note, and Ray Data's own time, in
            # each block of a fiftieth of a worker's batches; a rank notes after each 30 seconds of drawing.
            part, handed = (2000 // (50 * workers), 0.25) if name == "Ray Data" else (6, 0.0)
            each = 5.0 + 0.1 + (0.1 + handed) / part
            assert pictures_per_second(outcome, MEASURED) == pytest.approx(10 * workers / each, rel=0.02)
            (_, share) = shares(outcomes, MEASURED)[name][(1, 4).index(workers)]
            assert share == pytest.approx(100 * 5.0 / each, rel=0.02)
        assert speeds(outcomes, MEASURED)[name][0] == (1.0, pictures_per_second(line[0], MEASURED))


def test_a_row_says_workers_speed_share_hours_and_what_was_lost():
    measured = replace(MEASURED, service=(5.0,), write=(0.0,), start=0.0)
    (outcome,) = sweep(100, [2], measured, CALM)["Slurm array"]
    assert outcome.seconds == pytest.approx(25.0)
    assert row("x", outcome, MEASURED) == f"| 2 | x | 4 | 100% | {25 / 3600:.3g} | 0.00% | 0 |"
