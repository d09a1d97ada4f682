"""Prompt following of readings whose truth is known, and of the trained scorer where it is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm import postcards as world
from ldm.postcards.scoring.agreement import agreement, names, truth
from ldm.postcards.scoring.following import (
    ABOVE,
    ATTRIBUTES,
    BOTH,
    BOTH_COLOURS,
    COLOUR,
    COUNTS,
    ITS_COLOUR,
    KIND,
    PLACE,
    SIDE,
    STYLE,
    TIME,
    WEATHER,
    following,
)
from ldm.postcards.scoring.frozen import read_prompts
from ldm.postcards.scoring.names import sprite_names
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.scorer import Reading, Scorer
from ldm.postcards.scoring.sources import rendered
from ldm.postcards.sprites.scene import make_world

WEIGHTS = Path(__file__).parents[3] / "weights" / "postcard-eval"


@pytest.fixture(scope="module")
def prompts():
    return evaluation_prompts()


@pytest.fixture(scope="module")
def oracle(prompts):
    return truth([prompt.scene for prompt in prompts])


def share(prompts, reading):
    return {name: value.share for name, value in following(prompts, reading, names()).items()}


def test_what_is_there_is_found_to_follow(prompts, oracle):
    rates = following(prompts, oracle, names())
    assert list(rates) == [name for name in ATTRIBUTES if name != STYLE]  # goes without saying
    assert all(value.right == value.n > 0 for value in rates.values())
    assert rates[KIND].n == 600
    assert sum(rates[count].n for count in COUNTS.values()) == 120
    assert rates[BOTH].n == rates[BOTH_COLOURS].n == rates[SIDE].n + rates[ABOVE].n == 220


def test_other_prompts_are_followed_by_chance(prompts, oracle):
    """Prompts against the next one's picture: 7 places, 4 times, 4 weathers, 14 kinds, 8 colours."""
    shuffled = share([*prompts[1:], prompts[0]], oracle)
    assert shuffled[PLACE] == pytest.approx(1 / 7, abs=0.05)
    assert shuffled[TIME] == pytest.approx(1 / 4, abs=0.05)
    assert shuffled[WEATHER] == pytest.approx(1 / 4, abs=0.06)
    assert shuffled[KIND] < 1 / 14 + 0.04
    assert shuffled[COLOUR] < 0.03
    assert shuffled[BOTH_COLOURS] < 0.02


@pytest.mark.parametrize(
    ("field", "fail"),
    [
        ("place", {PLACE}),
        ("time", {TIME}),
        ("weather", {WEATHER}),
        ("colour", {COLOUR, ITS_COLOUR, BOTH_COLOURS}),
    ],
)
def test_each_mistake_is_counted_where_it_belongs_and_nowhere_else(prompts, oracle, field, fail):
    wrong = share(
        prompts, replace(oracle, **{field: getattr(oracle, field) + 1 - 2 * (getattr(oracle, field) > 0)})
    )
    assert {name for name, value in wrong.items() if value < 1} == fail
    assert all(wrong[name] == 0 for name in fail)


def test_mirrored_pictures_fail_left_and_right_only(prompts, oracle):
    wrong = share(prompts, replace(oracle, x=1 - oracle.x))
    assert {name for name, value in wrong.items() if value < 1} == {SIDE}
    assert wrong[SIDE] == 0
    upside_down = share(prompts, replace(oracle, y=1 - oracle.y))
    assert {name for name, value in upside_down.items() if value < 1} == {ABOVE}


def test_one_thing_more_fails_the_counts_only(prompts, oracle):
    wrong = share(
        prompts,
        replace(oracle, count=np.where(oracle.count == 3, 2, np.where(oracle.count == 2, 3, oracle.count))),
    )
    assert {name for name, value in wrong.items() if value < 1} == set(COUNTS.values())


def test_an_empty_picture_follows_nothing_but_the_scenery(prompts, oracle):
    empty = share(prompts, replace(oracle, count=0 * oracle.count, presence=0 * oracle.presence))
    assert {name for name, value in empty.items() if value > 0} == {PLACE, TIME, WEATHER}


def test_a_surer_other_thing_makes_one_object_wrong(prompts, oracle):
    """A picture of all kinds at once must not count as each of them."""
    crowded = replace(
        oracle, count=oracle.count.clip(1), presence=np.linspace(0.6, 0.9, 14) * np.ones_like(oracle.presence)
    )
    assert share(prompts, crowded)[KIND] < 0.15


def test_one_picture_for_each_prompt(prompts, oracle):
    with pytest.raises(ValueError, match="999 prompts but 1000"):
        following(prompts[1:], oracle, names())


def test_agreement_of_the_truth_with_itself_is_full_and_with_others_is_not(oracle):
    own = agreement(oracle, oracle)
    assert all(value.share == 1 and value.n for value in own.values())
    other = agreement(Reading(*(np.roll(value, 1, axis=0) for value in vars(oracle).values())), oracle)
    assert all(value.share < 0.7 for name, value in other.items() if name not in ("order", "style"))
    assert agreement(replace(oracle, x=1 - oracle.x, y=1 - oracle.y), oracle)["order"].share == 0


@pytest.mark.skipif(not (WEIGHTS / "scorer.json").exists(), reason="no trained scorer")
def test_the_trained_scorer_reads_renders():
    prompts = [prompt for prompt in evaluation_prompts(120) if prompt.objects][:64]
    scorer = Scorer.load(WEIGHTS)
    assert scorer.config.kinds == world.KINDS
    reading = scorer.read(rendered(prompts))
    there = truth([prompt.scene for prompt in prompts]).count > 0
    assert ((reading.count > 0) == there).all(axis=1).mean() >= 0.95


def test_sprites_are_asked_for_their_style_and_a_plain_background_for_its_colour():
    prompts = [each.prompt for each in read_prompts()]
    known = sprite_names(make_world(400))
    oracle = truth([prompt.scene for prompt in prompts], known)
    rates = following(prompts, oracle, known)
    assert list(rates) == list(ATTRIBUTES)
    assert all(value.right == value.n > 0 for value in rates.values())
    shuffled = following([*prompts[1:], prompts[0]], oracle, known)
    assert shuffled[KIND].share < 0.02
    assert shuffled[STYLE].share == pytest.approx(0.45, abs=0.05)  # where it is one of two, or a postcard
    other = replace(oracle, style=np.where(oracle.style == 0, 1, 0))
    wrong = {name: value.share for name, value in following(prompts, other, known).items()}
    assert {name: share for name, share in wrong.items() if share < 1} == {STYLE: 0}
