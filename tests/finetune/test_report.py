"""The report of a run: what it shows is what the run wrote, and the page needs nothing else."""

import io
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from read_page import SVG, Page

from ldm.errors import UserError
from ldm.evaluate import chart as charts
from ldm.evaluate.chart import BOTTOM, LEFT, RIGHT, TOP, chart, round_ticks, smooth, value_axis
from ldm.finetune.report import write_report

HOSTILE = "<script>alert('x')</script> & \"q\" $title ]]> \udcff"


def training_row(step, **values):
    place = {"step": step, "samples": 4 * step, "minutes": step / 7}
    return place | values | {"samples_per_s": 2.0 + step / 1000, "memory_gb": 5.5} | values


def make_run(run_dir, rows, grids=()):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "grids").mkdir()
    for step in grids:
        pixels = np.random.default_rng(step).integers(0, 256, (60, 1000, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(run_dir / "grids" / f"{step:08d}.png")


def report(run_dir, title="a run", facts=(), prompts=(), outputs=()):
    path = write_report(run_dir, title=title, facts=dict(facts), prompts=prompts, outputs=outputs)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


LOSSES = {step: 0.5 / step + 0.01 * math.sin(step) for step in range(5, 205, 5)}
HELD_OUT = {0: 0.31, 100: 0.2987654, 200: 0.3001}


@pytest.fixture
def run_dir(tmp_path):
    rows = [training_row(step, loss=loss, grad_norm=step / 3) for step, loss in LOSSES.items()]
    rows += [{"step": s, "samples": 4 * s, "minutes": s / 7, "held_out_loss": v} for s, v in HELD_OUT.items()]
    make_run(tmp_path / "run", sorted(rows, key=lambda row: row["step"]), range(0, 201, 20))
    return tmp_path / "run"


def polylines(svg):
    lines = [line.get("points").split() for line in svg.iter(f"{SVG}polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines]


# --- curves ----------------------------------------------------------------------------------------------


def test_the_last_values_are_those_of_the_metrics(run_dir):
    page = report(run_dir)
    assert f"Loss {LOSSES[200]:.5g} at step 200" in page.text
    assert "Held-out loss 0.3001 at step 200, lowest 0.29877 at step 100" in page.text
    assert "Gradient norm 66.667 at step 200" in page.text
    assert "Speed, images/s 2.2 at step 200" in page.text
    assert "Memory, GiB 5.5 at step 200" in page.text
    assert "steps 200 pictures shown 800 minutes 28.6" in page.text
    assert "skipped" not in page.text
    labels = [svg.get("aria-label") for svg in page.svgs]
    assert labels == ["Loss", "Held-out loss", "Gradient norm", "Speed, images/s", "Memory, GiB"]


def test_points_fall_where_a_closed_form_puts_them(run_dir):
    _, held_out, *_ = report(run_dir).svgs
    # From 0.2987 to 0.31 in fifths is about 0.0023 apart: ticks each 0.005, from 0.295 to 0.31.
    want = [
        (LEFT + (RIGHT - LEFT) * step / 200, BOTTOM - (BOTTOM - TOP) * (value - 0.295) / 0.015)
        for step, value in HELD_OUT.items()
    ]
    (line,) = polylines(held_out)
    assert line == pytest.approx([pytest.approx(point, abs=0.006) for point in want])
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in held_out.iter(f"{SVG}circle")]
    assert dots == line


def test_wide_ranges_are_logarithmic():
    points = [(1, 0.003), (2, 0.3), (4, 30.0)]
    raw, _ = polylines(ElementTree.fromstring(chart(points, False, "x")))
    low, high = math.log10(0.002), math.log10(50)
    for (step, value), (x, y) in zip(points, raw, strict=True):
        assert x == pytest.approx(LEFT + (RIGHT - LEFT) * step / 4, abs=0.006)
        share = (math.log10(value) - low) / (high - low)
        assert y == pytest.approx(BOTTOM - (BOTTOM - TOP) * share, abs=0.006)


def test_the_loss_is_smoothed_with_weights_that_add_up_to_one(run_dir):
    raw, smoothed = polylines(report(run_dir).svgs[0])
    values = list(LOSSES.values())  # 40: over 4 of them
    decay = 1 - 2 / 5
    for n in range(1, len(values) + 1):
        weights = np.array([decay ** (n - i) for i in range(1, n + 1)])
        assert smooth(values)[n - 1] == pytest.approx(weights @ values[:n] / weights.sum())
    up = value_axis(values)
    assert [y for _, y in smoothed] == pytest.approx([charts._y(up, v) for v in smooth(values)], abs=0.006)
    assert [y for _, y in raw] == pytest.approx([charts._y(up, v) for v in values], abs=0.006)
    assert smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 0.3233, [0.31, 0.315, 0.32, 0.325]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (0, 12345, [0, 5000, 10000, 15000]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert round_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 3e8, 1e38])
def test_ticks_are_few_and_enclose_all_values(scale):
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = (rng.standard_normal(5) + rng.uniform(-9, 9)) * rng.choice([1, 1e-3, 1e-12]) * scale
        values = values if rng.random() < 0.5 else np.exp(values / scale) * scale
        axis = value_axis(values.tolist())
        assert axis.low <= min(values) * (1 + 1e-12 * np.sign(-min(values)))
        assert axis.high >= max(values) * (1 - 1e-12 * np.sign(max(values)))
        assert 2 <= len(axis.ticks) <= 9
        assert all(0 <= axis.place(tick) <= 1 for tick in axis.ticks)
        assert len({f"{tick:.10g}" for tick in axis.ticks}) == len(axis.ticks)


@pytest.mark.parametrize("lowest", [1e-3, 3e-9, 7e-20, 1e-37])
def test_logarithmic_ticks_are_few_powers_of_ten(lowest):
    axis = value_axis([lowest, 4e6])
    assert axis.log
    assert 4 <= len(axis.ticks) <= 9
    exponents = np.log10(axis.ticks)
    assert exponents == pytest.approx(np.round(exponents))
    assert len(set(np.round(np.diff(exponents), 6))) == 1


def test_a_level_line_and_a_single_point_have_axes():
    for points in ([(0, 0.0)], [(7, 3.5)], [(1, 9.75), (2, 9.75)]):
        raw, smoothed = polylines(ElementTree.fromstring(chart(points, False, "x")))
        assert raw == smoothed
        assert all(LEFT <= x <= RIGHT and TOP < y < BOTTOM for x, y in raw)


def test_values_that_are_missing_or_no_numbers_are_left_out(tmp_path):
    rows = [
        training_row(10, loss=1.0, grad_norm=math.nan),
        training_row(20, loss=math.nan, samples_per_s=math.inf),
        training_row(30, loss=None, memory_gb="much"),
        training_row(40, loss=2.0, skipped=3),
        {"step": None, "loss": 9.0},
        {"step": 40, "samples": 160, "minutes": 1.0, "held_out_loss": math.nan},
    ]
    make_run(tmp_path / "run", rows)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 50, "lo')  # what a killed run leaves
    page = report(tmp_path / "run")
    raw, _ = polylines(page.svgs[0])
    assert [x for x, _ in raw] == pytest.approx([LEFT + (RIGHT - LEFT) / 4, RIGHT], abs=0.006)
    labels = [svg.get("aria-label") for svg in page.svgs]
    assert labels == ["Loss", "Speed, images/s", "Memory, GiB"]
    assert "skipped steps 3" in page.text
    assert "nan" not in page.text.lower()
    assert "inf" not in page.text.lower()


# --- pictures --------------------------------------------------------------------------------------------


def test_the_first_and_last_grid_are_embedded_as_they_are(run_dir):
    page = report(run_dir, prompts=["a cat", "a dog"])
    for data, step in zip(page.images, (0, 200), strict=False):
        assert data == (run_dir / "grids" / f"{step:08d}.png").read_bytes()
    assert "Before: step 0 After: step 200" in page.text
    assert "a cat a dog" in page.text


def test_small_pictures_lie_between(run_dir):
    page = report(run_dir)
    steps = [int(step) for step in re.findall(r"step (\d+)", page.text.partition("Curves")[0])]
    between = steps[2:]
    assert between == sorted(set(between))
    assert set(between) < set(range(20, 200, 20))
    assert page.kinds == ["data:image/png"] * 2 + ["data:image/jpeg"] * 6
    assert len(between) == 6
    for data, step in zip(page.images[2:], between, strict=True):
        small = Image.open(io.BytesIO(data))
        with Image.open(run_dir / "grids" / f"{step:08d}.png") as whole:
            want = np.asarray(whole.resize(small.size, Image.Resampling.BOX), float)
        assert max(small.size) == 480
        assert np.abs(np.asarray(small, float) - want).mean() < 25  # noise at half its size; another's: 47
    gaps = np.diff([0, *between, 200])
    assert gaps.max() <= 40


@pytest.mark.parametrize(("grids", "told"), [([0], "Before: step 0"), ([50], "step 50")])
def test_a_single_grid_is_shown_once(tmp_path, grids, told):
    make_run(tmp_path / "run", [], grids)
    page = report(tmp_path / "run")
    assert len(page.images) == 1
    assert told in page.text
    assert "After" not in page.text


def test_a_damaged_grid_loses_no_report(run_dir):
    path = run_dir / "grids" / "00000120.png"
    path.write_bytes(path.read_bytes()[:500])
    page = report(run_dir)
    assert "00000120.png" in page.text
    assert len(page.images) == 7


# --- the page --------------------------------------------------------------------------------------------


def test_nothing_that_is_given_is_html(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(training_row(210, **{HOSTILE: 1.0})) + "\n")
    page = report(run_dir, HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE], [(run_dir / HOSTILE[:7], HOSTILE)])
    shown = HOSTILE.replace("\udcff", "?")
    assert page.text.count(shown) == 7  # title, heading, fact and its name, prompt, curve, use of an output
    assert "script" not in {tag for tag, _ in page.tags}
    assert shown in [svg.get("aria-label") for svg in page.svgs]


def test_the_page_needs_nothing_else(run_dir):
    page = report(run_dir, "t", {"rank": 4}, ["a cat"], [(run_dir, "load it")])
    assert page.open == []
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    addresses = [
        value for _, attributes in page.tags for value in attributes.values() if "//" in (value or "")
    ]
    assert [value for value in addresses if not value.startswith("data:")] == [SVG[1:-1]] * len(page.svgs)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "rank 4" in page.text
    assert f"{run_dir} load it" in page.text


def test_a_run_without_metrics_and_grids_says_so(tmp_path):
    page = report(tmp_path / "run")
    assert (
        page.text
        == "a run a run Pictures None were drawn. Curves Nothing was logged. Files None were written."
    )
    assert page.svgs == page.images == []


def test_it_is_written_whole_or_not_at_all(run_dir, monkeypatch):
    report(run_dir, "before")
    before = (run_dir / "report.html").read_bytes()
    files = sorted(run_dir.iterdir())

    def full(self, text, **_):
        self.write_bytes(text.encode()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match=r"cannot write to .*report\.html: No space left"):
        report(run_dir, "after")
    assert (run_dir / "report.html").read_bytes() == before
    assert sorted(run_dir.iterdir()) == files
