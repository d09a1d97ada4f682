"""The page of an evaluation: the figures, marks where a closed form puts them, the pictures."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from broken_pictures import scene
from PIL import Image
from read_page import SVG, Page

from ldm.evaluate.chart import (
    BOTTOM,
    COLOURS,
    LEFT,
    NAMES,
    RIGHT,
    TOP,
    Bar,
    curves,
    histogram,
    ratios,
    shares,
)
from ldm.evaluate.figures import Figure, Found, rate_figure
from ldm.evaluate.overview import SHOWN, write_overview
from ldm.evaluate.report import rate

HOSTILE = "<script>alert('x')</script>"


def boxes(svg):
    """(x, y, width, height) of each."""
    names = ("x", "y", "width", "height")
    return [tuple(float(rect.get(name)) for name in names) for rect in svg.iter(f"{SVG}rect")]


def test_a_histogram_counts_what_lies_in_each_bin():
    values = [0.0] * 3 + [1.0] * 5 + [9.99] * 1 + [10.0] * 1
    drawn = boxes(ElementTree.fromstring(histogram(values, "dB", "x")))
    assert len(drawn) == 5  # of 2 each, from 0 to 10
    heights = [height for *_, height in drawn]
    assert heights == pytest.approx([BOTTOM - TOP, 0, 0, 0, (BOTTOM - TOP) * 2 / 8], abs=0.01)
    assert [x for x, *_ in drawn] == pytest.approx(
        [LEFT + k * (RIGHT - LEFT) / 5 for k in range(5)], abs=0.01
    )


def test_bars_reach_to_their_shares():
    svg = ElementTree.fromstring(shares([Bar("a", 0.5, 0.25, 1.0), Bar("b", 0.0, 0.0, 0.1)], "x"))
    assert [width for _, _, width, _ in boxes(svg)] == pytest.approx([(RIGHT - NAMES) / 2, 0], abs=0.01)
    whiskers = [p.get("d") for p in svg.iter(f"{SVG}path") if p.get("stroke-width")]
    x, end = map(float, re.fullmatch(r"M([\d.]+),[\d.]+H([\d.]+)", whiskers[0]).groups())
    assert (x, end) == pytest.approx((NAMES + (RIGHT - NAMES) / 4, RIGHT), abs=0.01)


def test_ratios_may_be_above_one_where_a_line_is():
    svg = ElementTree.fromstring(ratios([Bar("a", 1.5, 1.2, 1.9), Bar("b", 0.5, 0.4, 0.6)], "x"))
    wide = (RIGHT - NAMES) / 2  # from 0 to 2
    assert [width for _, _, width, _ in boxes(svg)] == pytest.approx([1.5 * wide, 0.5 * wide], abs=0.01)
    (line,) = (p.get("d") for p in svg.iter(f"{SVG}path") if len(p.attrib) == 2)
    assert line.startswith(f"M{NAMES + wide:.2f},")


def test_curves_have_a_colour_each_and_logarithmic_axes_where_they_are_wide():
    series = {"a": [(1, 0.0), (10, 1.0), (100, 2.0)], "b": [(10, 2.0)]}
    svg = ElementTree.fromstring(curves(series, "workers", "x"))
    dots = [(c.get("fill"), float(c.get("cx")), float(c.get("cy"))) for c in svg.iter(f"{SVG}circle")]
    middle, centre = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    assert dots == [
        (COLOURS[0], LEFT, BOTTOM),
        (COLOURS[0], middle, centre),
        (COLOURS[0], RIGHT, TOP),
        (COLOURS[1], middle, TOP),
    ]
    texts = {text.text: text.get("fill") for text in svg.iter(f"{SVG}text")}
    assert (texts["a"], texts["b"], texts["workers"]) == (COLOURS[0], COLOURS[1], "currentColor")


def test_the_page_shows_figures_charts_and_the_pictures_at_both_ends(tmp_path):
    scores = {f"{k:02}.png": float(k) for k in range(3 * SHOWN)}
    for k, name in enumerate(scores):
        scene(k, (400, 300)).save(tmp_path / name)
    found = Found(
        (
            Figure("CLIP score", 11.5, "higher", {"with captions": 24}, 10, 13, "95 % bootstrap"),
            rate_figure("recall", rate([True, False]), {"measured": 2}, ["few"]),
        ),
        {"FID": f"needs {HOSTILE}"},
        {"CLIP score": scores},
        {"features": {"sha256": "abc", "dims": 8}, "seed": 3},
    )
    path = write_overview(tmp_path / "out.html", "Evaluation", found, {"CLIP score": tmp_path})
    page = Page(path.read_text(encoding="utf-8"))
    assert "CLIP score 11.5 [10, 13] 95 % bootstrap higher 24 with captions" in page.text
    assert "recall: few" in page.text
    assert f"FID: needs {HOSTILE}" in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert "features, sha256 abc features, dims 8 seed 3" in page.text
    assert [svg.get("aria-label") for svg in page.svgs] == [
        "Shares with their 95 % intervals",
        "CLIP score: how many pictures",
    ]
    shown = [Image.open(io.BytesIO(data)) for data in page.images]
    assert len(shown) == 2 * SHOWN
    order = [*range(SHOWN), *range(3 * SHOWN - 1, 2 * SHOWN - 1, -1)]
    for image, k in zip(shown, order, strict=True):
        small = np.asarray(scene(k, (400, 300)).resize(image.size, Image.Resampling.BOX), float)
        assert max(image.size) == 192
        assert np.abs(np.asarray(image, float) - small).mean() < 10


def test_nothing_measured_is_a_page_too(tmp_path):
    path = write_overview(tmp_path / "out.html", "t", Found(), {})
    assert "Nothing could be measured." in Page(path.read_text(encoding="utf-8")).text
