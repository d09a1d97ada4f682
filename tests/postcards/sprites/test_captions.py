"""Captions of sprite scenes: what they claim is what is in the scene."""

import random
import re

import pytest

from ldm import postcards
from ldm.postcards.sprites import mixture, phrases
from ldm.postcards.sprites.captions import articles, caption, full_caption, names_of, reword
from ldm.postcards.sprites.scene import PLAIN, make_world, sample_scene
from ldm.postcards.vocabulary import COLOURS


@pytest.fixture(scope="module")
def told():
    """Scenes with three captions each: usual, in other words, in new words."""
    world, rng = make_world(400, ("flat", "3d", "noto", "twemoji")), random.Random(0)
    pairs = []
    for _ in range(1500):
        scene = sample_scene(world, rng)
        text = caption(scene, rng)
        pairs.append((scene, text, reword(text, scene, rng), caption(scene, rng, new=True)))
    return pairs


def said(name, text):
    return re.search(rf"(?<![\w-]){re.escape(name.lower())}(?![\w-])", text.lower())


def test_every_thing_is_named(told):
    for scene, *texts in told:
        for text in (*texts, full_caption(scene)):
            for group in scene.groups:
                assert any(said(name, text) for name in names_of(group)), text


def test_a_paint_is_always_told_and_no_other_colour_is(told):
    words = {"red": "red|crimson|scarlet", "purple": "purple|violet"}
    for scene, text, _, _ in told:
        for name in (name for group in scene.groups for name in names_of(group)):
            text = re.sub(re.escape(name), "", text, flags=re.IGNORECASE)
        paints = {group.colour for group in scene.groups} - {None}
        paints |= {scene.backdrop} if scene.place == PLAIN else set()
        found = {
            colour for colour in COLOURS if re.search(rf"\b({words.get(colour, colour)})\b", text.lower())
        }
        green = {"green"} if "green hills" in text.lower() else set()
        assert found - green <= paints, text
        assert {group.colour for group in scene.groups} - {None} <= found, text


def test_a_style_is_told_by_its_own_words(told):
    own = {"flat": "flat|vector", "3d": "3d", "noto": "cartoon", "twemoji": "clip.?art"}
    for scene, text, _, _ in told:
        for style, words in own.items():
            assert style == scene.style or not re.search(rf"\b({words})\b", text.lower()), text
            assert style == scene.style or not re.search(
                rf"\b({words})\b", phrases.NEW_STYLES[scene.style][0]
            )
        assert re.search(own[scene.style], full_caption(scene))


def test_things_that_postcards_show_are_told_with_their_style(told):
    nouns = {noun for pairs in postcards.phrases.NOUNS.values() for pair in pairs for noun in pair}
    own = {"flat": "flat|vector", "3d": "3d", "noto": "cartoon", "twemoji": "clip.?art"}
    shared = 0
    for scene, text, _, _ in told:
        if any(name in nouns for group in scene.groups for name in names_of(group)):
            assert re.search(own[scene.style], text.lower()), text
            shared += 1
    assert shared > 20


def test_counts_sizes_and_sides(told):
    for scene, text, _, _ in told:
        low = text.lower()
        counts = {group.count for group in scene.groups}
        assert (3 in counts) == bool(re.search(r"\b(three|3)\b", low)), text
        big, small = (re.search(rf"\b({'|'.join(phrases.SIZES[size])})\b", low) for size in ("big", "small"))
        assert bool(big) == (scene.size == "big"), text
        assert bool(small) == (scene.size == "small"), text


def test_who_is_on_the_left(told):
    checked = 0
    for scene, text, _, _ in told:
        if scene.relation != "left of" or "left" not in text.lower() or " and " in text:
            continue
        first, second = (
            min(match.start() for name in names_of(group) if (match := said(name, text)))
            for group in scene.groups
        )
        assert (first < second) == ("left of" in text.lower()), text
        checked += 1
    assert checked > 15


def test_new_words_are_kept_from_training(told):
    usual = " ".join(text.lower() for _, text, other, _ in told for text in (text, other))
    for new in ("isolated on", "on a solid", "rendered in 3d", "wooden desk", "on top of a table"):
        assert new not in usual
        assert any(new in text.lower() for *_, text in told)


def test_articles():
    assert (
        articles("a orange, a unicorn, a hourglass, a ant, a UFO")
        == "an orange, a unicorn, an hourglass, an ant, a UFO"
    )


def test_postcards_in_the_mixture_are_told_as_they_are():
    mixed, rng = mixture.Mixture(make_world(10), postcards=1.0), random.Random(0)
    scenes = [mixed.sample(rng) for _ in range(200)]
    assert all(isinstance(scene, postcards.Scene) for scene in scenes)
    texts = [mixture.caption(scene, rng) for scene in scenes]
    assert 0.05 < sum("postcard" in text and text.endswith(phrases.POSTCARD) for text in texts) / 200 < 0.3


def test_the_same_postcards_as_alone():
    mixed = mixture.Mixture(make_world(10), postcards=1.0)
    a, b = random.Random(4), random.Random(4)
    b.random()
    assert mixed.sample(a) == postcards.sample_scene(b)
