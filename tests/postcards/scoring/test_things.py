"""Which things hold, and what is told of those that do not."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.postcards.scoring.agreement import truth
from ldm.postcards.scoring.following import KIND, following
from ldm.postcards.scoring.frozen import read_prompts
from ldm.postcards.scoring.names import sprite_names
from ldm.postcards.scoring.things import apart, by_thing, joined, taken, told
from ldm.postcards.sprites.scene import make_world

NAMES = sprite_names(make_world(100))


@pytest.fixture(scope="module")
def frozen():
    return read_prompts(100)


@pytest.fixture(scope="module")
def prompts(frozen):
    return [each.prompt for each in frozen]


@pytest.fixture(scope="module")
def oracle(prompts):
    return truth([prompt.scene for prompt in prompts], NAMES)


def test_of_a_faultless_model_all_things_hold(prompts, oracle):
    things = by_thing(prompts, oracle, NAMES)
    assert set(things) == set(NAMES.kinds)
    assert all(each.rate.share == 1 and each.rate.n >= 2 for each in things.values())
    assert told(things) == f"{len(things)} of {len(things)} things hold: 70% of their prompts right"


def test_what_is_drawn_as_another_thing_is_told(prompts, oracle):
    dog, cat = (NAMES.kinds.index(noun) for noun in ("dog", "cat"))
    presence, count = oracle.presence.copy(), oracle.count.copy()
    for values in (presence, count):
        values[:, cat] = np.maximum(values[:, cat], values[:, dog])
        values[:, dog] = 0
    things = by_thing(prompts, replace(oracle, presence=presence, count=count), NAMES)
    wrong = {noun: each for noun, each in things.items() if each.rate.share < 1}
    assert list(wrong) == ["dog"]
    alone = [p for p in prompts if [(each.kind, each.count) for each in p.objects] == [("dog", 1)]]
    assert wrong["dog"].row() == {"right": 0, "n": things["dog"].rate.n, "seen as": {"cat": len(alone)}}
    assert f"\n0 of {things['dog'].rate.n}  dog  (cat)" in told(things)


def test_a_surer_other_thing_beside_it_is_wrong_only_where_it_should_be_alone(prompts, oracle):
    crowded = replace(oracle, presence=0.5 * oracle.presence, count=oracle.count)
    crowded.presence[:, NAMES.kinds.index("sun")] = 0.9
    things = by_thing(prompts, crowded, NAMES)
    named = [[each.kind for each in prompt.objects] for prompt in prompts if prompt.relation]
    paired = sum("car" in kinds for kinds in named)
    assert 0 < paired <= things["car"].rate.right < things["car"].rate.n
    assert things["sun"].rate.share == 1


def test_combinations_that_training_lacks_have_columns_of_their_own(frozen, prompts, oracle):
    blind = replace(oracle, presence=oracle.presence.copy(), count=oracle.count.copy())
    placed = [i for i, each in enumerate(frozen) if each.unseen == "place"]
    blind.count[placed] = 0
    columns = dict(apart(frozen, blind, NAMES))
    assert list(columns) == ["held-out colour", "held-out place", "held-out style"]
    assert [column[KIND].share for column in columns.values()] == [1, 0, 1]
    whole = following(prompts, oracle, NAMES)
    halves = [range(300), range(300, len(prompts))]
    again = joined(*(taken(oracle, half) for half in halves))
    assert following(prompts, again, NAMES) == whole
