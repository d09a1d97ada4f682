"""Retrieval by thumbnails: renders are read right, also when an autoencoder has had them; noise is not."""

import random
import re

import numpy as np
import pytest

from ldm.postcards.sprites.picture import render
from ldm.postcards.sprites.retrieval import alone, by_thing, retrieve, summary, thumbnail
from ldm.postcards.sprites.scene import make_world


@pytest.fixture(scope="module")
def world():
    return make_world(60, ("flat", "3d"))


def drawer(world, size):
    """Draws what prompts ask for, elsewhere and mirrored at random."""
    rng = random.Random(9)

    def draw(prompts):
        drawn = []
        for prompt in prompts:
            style = "3d" if "3d" in prompt else "flat"
            name = re.match(r"(?:an? |)(.*) on a \w+ background", prompt)[1]
            thing = next(thing for thing in world.things if thing.noun == name)
            picture = render(alone(thing, style, rng), size)
            drawn.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
        return drawn

    return draw


@pytest.mark.parametrize("size", [128, 256])
def test_renders_are_read_right(world, size):
    verdicts = retrieve(world, drawer(world, size), limit=40)
    assert len(verdicts) == 40
    right = sum(each.right for each in verdicts)
    assert right >= 39
    assert summary(verdicts)["right"] == right / 40
    wrong = {each.thing.noun: each.nearest[0] for each in verdicts if not each.right}
    table = by_thing(verdicts)
    assert {noun for noun, row in table.items() if row["right"] < 1} == set(wrong)
    assert all(table[noun]["seen as"] == [seen] for noun, seen in wrong.items())
    assert sum(each.right_in_style for each in verdicts) >= 38
    assert all(each.in_five for each in verdicts)


def test_noise_and_nothing_are_not(world):
    rng = np.random.default_rng(0)
    noise = retrieve(
        world, lambda prompts: list(rng.integers(0, 256, (len(prompts), 64, 64, 3), np.uint8)), 32
    )
    blank = retrieve(world, lambda prompts: [np.full((64, 64, 3), 200, np.uint8)] * len(prompts), 32)
    assert sum(each.right for each in noise) <= 4
    assert sum(each.right for each in blank) <= 4


def test_a_thumbnail_is_the_thing_alone():
    picture = np.full((64, 64, 3), (10, 200, 30), np.uint8)
    picture[20:40, 8:48] = (250, 0, 0)
    small = thumbnail(picture)
    np.testing.assert_array_equal(small[6:18], np.broadcast_to((250, 0, 0), (12, 24, 3)))
    np.testing.assert_array_equal(small[:6], np.broadcast_to((128, 128, 128), (6, 24, 3)))
    assert (thumbnail(np.full((64, 64, 3), 7, np.uint8)) == 128).all()
