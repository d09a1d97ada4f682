"""Wilson intervals against published values, and the tables."""

import json

import pytest

from ldm.evaluate.report import markdown, rate, write_json


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_wilson_interval_as_newcombe_1998_table_1(right, n, low, high):
    got = rate([True] * right + [False] * (n - right))
    assert (got.right, got.n) == (right, n)
    assert got.low == pytest.approx(low, abs=6e-5)
    assert got.high == pytest.approx(high, abs=6e-5)


def test_nothing_counted_says_nothing():
    assert (rate([]).low, rate([]).high, str(rate([]))) == (0.0, 1.0, "—")


def test_markdown_leaves_out_rows_that_nobody_counted():
    table = {"model": {"place": rate([True, False])}, "renders": {"place": rate([True, True])}}
    lines = markdown(table, ["place", "time"]).splitlines()
    assert len(lines) == 3
    assert lines[0] == "| | model | renders |"
    assert lines[2].startswith("| place | 0.500 [")
    assert "| 1.000 [" in lines[2]


def test_json_holds_facts_and_rates(tmp_path):
    path = tmp_path / "deep" / "out.json"
    write_json(path, {"model": {"place": rate([True, False])}}, {"steps": 20})
    read = json.loads(path.read_text())
    assert read["steps"] == 20
    assert read["following"]["model"]["place"]["share"] == 0.5
