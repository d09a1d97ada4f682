"""The evaluation prompts stay what they are, and claim what they say and no more."""

import random
from collections import Counter

import pytest

from ldm import postcards as world
from ldm.postcards import captions
from ldm.postcards.scoring.prompts import MIX, composition, digest, evaluation_prompts, state


@pytest.fixture(scope="module")
def seen():
    return evaluation_prompts()


@pytest.fixture(scope="module")
def held_out():
    return evaluation_prompts(held_out=True)


def pairs(prompt):
    return [(group.kind, group.colour) for group in prompt.scene.groups]


def test_the_prompts_are_fixed(seen, held_out):
    """Figures are compared over years: who changes the world's sampling or captions must see this fail."""
    assert (len(seen), digest(seen)) == (1000, "df6d733f3a46e67a")
    assert (len(held_out), digest(held_out)) == (500, "ed60ed3951af3b86")


def test_seen_prompts_hold_no_held_out_pair_and_held_out_ones_hold_one_each(seen, held_out):
    assert not any(world.is_held_out(*pair) for prompt in seen for pair in pairs(prompt))
    assert all(sum(world.is_held_out(*pair) for pair in pairs(prompt)) == 1 for prompt in held_out)


def test_the_mix_is_as_documented_in_the_whole_and_nearly_in_a_part(seen):
    counted = Counter(composition(prompt.scene) for prompt in seen)
    assert {name: n / 1000 for name, n in counted.items()} == pytest.approx(MIX)
    part = Counter(composition(prompt.scene) for prompt in evaluation_prompts(200))
    assert all(abs(part[name] / 200 - share) < 0.08 for name, share in MIX.items())
    assert evaluation_prompts(200) == seen[:200]


def test_half_are_full_captions(seen):
    full = [prompt for prompt in seen if prompt.text == world.full_caption(prompt.scene)]
    assert 490 <= len(full) <= 520  # a natural caption may happen to be the full one
    for prompt in full:
        assert (prompt.place, prompt.time) == (prompt.scene.place, prompt.scene.time)
        assert (prompt.weather, prompt.relation) == (prompt.scene.weather, prompt.scene.relation)
        named = [(each.kind, each.colour, each.count) for each in prompt.objects]
        assert named == [(group.kind, group.colour, group.count) for group in prompt.scene.groups]


def test_every_prompt_names_its_things_with_colours(seen, held_out):
    for prompt in (*seen, *held_out):
        assert len(prompt.objects) == len(prompt.scene.groups)
        assert all(named.colour for named in prompt.objects)


def test_what_a_caption_states_is_what_it_was_told_to_mention(monkeypatch):
    """The words say the same as the caption grammar's own choice of what to mention, for 2,000 captions."""
    chosen, sample = [], captions._sample_mentions
    monkeypatch.setattr(
        captions, "_sample_mentions", lambda scene, rng: chosen.append(sample(scene, rng)) or chosen[-1]
    )
    for seed in range(2000):
        rng = random.Random(f"mentions {seed}")
        scene = world.sample_scene(rng, held_out=seed % 4 == 0)
        prompt = state(world.caption(scene, rng), scene)
        mentions = chosen[-1]
        assert (prompt.place is not None) == mentions.place, prompt.text
        assert (prompt.time is not None) == mentions.time, prompt.text
        if scene.weather != "clear":  # "on a sunny day" implies it, "on a clear night" says it with the time
            assert (prompt.weather is not None) == mentions.weather, prompt.text
        assert bool(prompt.objects) == (mentions.things and bool(scene.groups)), prompt.text
        assert all((named.colour is not None) == mentions.colour for named in prompt.objects), prompt.text


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("a red rocket above a blue house under a cloudy sky", "above"),
        ("a blue house beneath a red rocket", "above"),
        ("a red rocket and a blue house under a cloudy sky", None),
        ("a red rocket and a blue house under the stars", None),
    ],
)
def test_a_relation_is_stated_by_its_own_words(text, relation):
    rng = random.Random(0)
    while (scene := world.sample_scene(rng)).relation != "above":
        pass
    assert state(text, scene).relation == relation
