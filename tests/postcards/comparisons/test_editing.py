"""What edits are measured on and with, held against renders."""

from pathlib import Path

import numpy as np
import pytest

import ldm
from ldm import postcards as world
from ldm.postcards.comparisons.editing import (
    WHAT,
    edited,
    image_to_image,
    measured,
    renders,
    sample_cases,
    sheet,
)
from ldm.postcards.scoring.scorer import Scorer

SCORER = Path(__file__).parents[3] / "weights" / "postcard-eval"


@pytest.fixture(scope="module")
def cases():
    return sample_cases(24)


def test_a_case_changes_one_thing(cases):
    assert sample_cases(24) == cases
    for case in cases:
        before, after = (
            {"time": s.time, "place": s.place, "weather": s.weather, "seed": s.seed, **vars(s.groups[0])}
            for s in (case.source, case.target)
        )
        assert [name for name in before if before[name] != after[name]] == [case.what]
    assert [case.what for case in cases] == [*WHAT] * 6


def test_the_scorer_finds_all_in_the_targets_and_none_in_the_sources(cases):
    scorer = Scorer.load(SCORER)
    targets = np.stack([world.render(case.target) for case in cases])
    for what, (right, kept) in measured(scorer, cases, targets).items():
        assert right.share > 0.8, what
        assert kept == 60
    for what, (right, kept) in measured(scorer, cases, renders(cases)).items():
        assert right.right == 0, what
        assert kept > 20, what
        assert (kept == 60) == (what in ("colour", "kind")), what


def test_edits_keep_more_than_image_to_image(cases):
    pipe, few = ldm.load(device="cpu", dtype="fp32"), cases[:2]
    scorer, steps = Scorer.load(SCORER), {"num_inference_steps": 4}
    edits, others = edited(pipe, few, **steps), image_to_image(pipe, few, **steps)
    figures, beside = measured(scorer, few, edits), measured(scorer, few, others)
    for what in ("colour", "kind"):
        assert figures[what][1] > 6 + beside[what][1]
    columns = np.asarray(sheet(pipe, few[:1], [edits[:1], others[:1]], 4))
    assert columns.shape == (130 + 2, 5 * 130 + 2, 3)
    assert np.array_equal(columns[2:130, 392:520], edits[0])
    assert np.array_equal(columns[2:130, 2:130], renders(few)[0])
