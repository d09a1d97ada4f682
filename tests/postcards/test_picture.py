"""What the pictures show, read from their pixels."""

import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("skia")

from ldm import postcards
from ldm.postcards import COLOURS, KINDS, PLACES, TIMES, WEATHERS, Box, Group, Scene
from ldm.postcards.canvas import rgb
from ldm.postcards.things import PAINT
from ldm.postcards.vocabulary import SHAPES

# Named colours as anyone would write them, and what else things are made of.
NAMED = {
    "red": (230, 40, 40),
    "orange": (255, 140, 20),
    "yellow": (255, 215, 40),
    "green": (40, 170, 80),
    "blue": (40, 100, 225),
    "purple": (140, 70, 200),
    "pink": (250, 140, 195),
    "white": (250, 250, 250),
}
OTHER = (
    (43, 45, 66),
    (110, 68, 51),
    (90, 98, 144),
    (125, 125, 140),
    (140, 90, 50),
    (240, 223, 192),
    (207, 234, 248),
)


LIGHT = {"dawn": (1, 1, 1), "day": (1, 1, 1), "sunset": (1, 0.93, 0.89), "night": (0.91, 0.92, 1)}


def scenes(n, seed=0):
    rng = random.Random(seed)
    return [postcards.sample_scene(rng, held_out=i % 4 == 3) for i in range(n)]


def one(kind, colour, *, time="day", place=None, weather="clear", height=0.6):
    place = place or {"ground": "meadow", "water": "sea", "air": "mountains"}[SHAPES[kind].realm]
    half = SHAPES[kind].half_width * height
    return Scene(
        place, time, weather, (Group(kind, colour, (Box(0.5 - half, 0.3, 0.5 + half, 0.9),)),), seed=3
    )


def alone(scene, group, box):
    return replace(scene, groups=(replace(group, boxes=(box,)),))


def grown(mask):
    """The mask and its four neighbours."""
    padded = np.pad(mask, 1)
    return mask | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]


def test_same_scene_same_pixels():
    for scene in scenes(20):
        first = postcards.render(scene)
        random.random()
        assert (postcards.render(scene) == first).all()
        assert (postcards.render(replace(scene, seed=scene.seed + 1)) != first).any()


@pytest.mark.parametrize("size", [32, 33, 100, 128, 257])
def test_any_size(size):
    scene = scenes(3, seed=5)[2]
    picture, mask = postcards.render(scene, size), postcards.object_mask(scene, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert mask.shape == (size, size)
    assert mask.dtype == np.bool_


def test_the_size_changes_nothing_but_the_size():
    for scene in scenes(12, seed=6):
        large = postcards.render(scene, 256).astype(float).reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(large - postcards.render(scene, 64)).mean() < 4


def test_things_do_not_touch_each_other_or_the_border():
    for scene in scenes(300, seed=1):
        masks = [
            postcards.object_mask(alone(scene, group, box)) for group in scene.groups for box in group.boxes
        ]
        whole = postcards.object_mask(scene)
        assert (whole == np.any([np.zeros_like(whole), *masks], axis=0)).all()
        assert not whole[0].any()
        assert not whole[-1].any()
        assert not whole[:, 0].any()
        assert not whole[:, -1].any()
        for i, mask in enumerate(masks):
            assert mask.sum() > 200
            assert not any((grown(mask) & other).any() for other in masks[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_fills_its_box_and_no_more(kind):
    scene, size = one(kind, "red"), 256
    box = scene.groups[0].boxes[0]
    rows, columns = (np.flatnonzero(postcards.object_mask(scene, size).any(axis)) for axis in (1, 0))
    assert rows[0] / size == pytest.approx(box.top, abs=0.02)
    assert (rows[-1] + 1) / size == pytest.approx(box.bottom, abs=0.02)
    assert columns[0] / size >= box.left - 0.005
    assert (columns[-1] + 1) / size <= box.right + 0.005
    assert (columns[-1] + 1 - columns[0]) / size > 0.85 * (box.right - box.left)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_main_colour_of_a_thing_is_its_own(kind, time):
    """Of the named colours, in the light of the hour, the nearest to most pixels is the thing's own.

    White is left out where it is not the colour, since snow and spots are white.
    """
    references = np.array([*NAMED.values(), *OTHER]) * LIGHT[time]
    for colour in COLOURS:
        scene = one(kind, colour, time=time)
        pixels = postcards.render(scene)[postcards.object_mask(scene)].astype(float)
        nearest = np.linalg.norm(pixels[:, None] - references, axis=-1).argmin(1)
        share = np.bincount(nearest, minlength=len(references))[: len(NAMED)] / len(pixels)
        if colour != "white":
            share[COLOURS.index("white")] = 0
        assert COLOURS[share.argmax()] == colour
        assert share.max() > 0.15


@pytest.mark.parametrize("colour", COLOURS)
def test_a_shade_is_nearer_to_its_colour_than_to_any_other(colour):
    rng = random.Random(0)
    shades = np.array([postcards.shade(colour, rng) for _ in range(500)])
    distance = np.linalg.norm(shades[:, None] - np.array(list(NAMED.values())), axis=-1)
    own = distance[:, COLOURS.index(colour)].copy()
    distance[:, COLOURS.index(colour)] = np.inf
    assert (own < distance.min(1)).mean() > 0.95  # these are not quite the world's paints
    assert np.quantile(own, 0.75) > 30  # but not the colour itself


@pytest.mark.parametrize("kind", ["mushroom", "lighthouse"])
def test_spots_and_bands_are_seen_on_whatever_is_nearly_white(kind):
    rng = random.Random(0)
    for _ in range(20):
        paint = postcards.shade("white", rng)
        scene = one(kind, "white")
        pixels = postcards.render(scene, 128, [paint])[postcards.object_mask(scene)].astype(float)
        off = np.abs(pixels - np.array(paint)).max(1)
        spots = rgb("d9b48c") if kind == "mushroom" else rgb("b9c4d2")
        is_spot = np.abs(pixels - np.array(spots)).max(1) < 6
        white = np.abs(pixels - 248).max(1) < 15
        assert (is_spot | (white & (off > 25))).mean() > 0.01


def test_paints_take_the_place_of_colours():
    for scene in scenes(6):
        other = {name: COLOURS[(i + 1) % len(COLOURS)] for i, name in enumerate(COLOURS)}
        changed = replace(scene, groups=tuple(replace(g, colour=other[g.colour]) for g in scene.groups))
        paints = [PAINT[group.colour] for group in changed.groups]
        assert (postcards.render(scene, 64, paints) == postcards.render(changed, 64)).all()
    with pytest.raises(ValueError, match="2 paints are not one for each of 1 groups"):
        postcards.render(one("car", "red"), 64, [PAINT["red"]] * 2)


# Half of these is roof, stem, snow or bands, of which the mean colour is more than their own.
MIXED = ("house", "snowman", "mushroom", "lighthouse")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MIXED])
def test_the_mean_colour_is_nearest_to_the_named_one_by_day(kind):
    references = np.array(list(NAMED.values()), float)
    for colour in COLOURS:
        scene = one(kind, colour)
        mean = postcards.render(scene)[postcards.object_mask(scene)].mean(0)
        # Dark details darken the mean, so hues are compared: colours less their mean, scaled to unit length.
        hues = references - references.mean(1, keepdims=True)
        hue = mean - mean.mean()
        if colour == "white":
            assert np.ptp(mean) < 45
            continue
        hues = hues[:-1] / np.linalg.norm(hues[:-1], axis=1, keepdims=True)
        likeness = hues @ (hue / np.linalg.norm(hue))
        assert likeness[COLOURS.index(colour)] > likeness.max() - 0.06


def test_places_times_and_weathers_all_look_different():
    """Empty scenes differ more between any two settings than between seeds of one."""
    blurred = {}
    for place in PLACES:
        for time in TIMES:
            for weather in WEATHERS:
                pictures = [postcards.render(Scene(place, time, weather, (), seed), 64) for seed in (1, 2, 3)]
                blurred[place, time, weather] = (
                    np.mean(pictures, 0).reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel()
                )
    names, vectors = list(blurred), np.stack(list(blurred.values()))
    distances = np.abs(vectors[:, None] - vectors).mean(-1) + 1e9 * np.eye(len(names))
    i, j = np.unravel_index(distances.argmin(), distances.shape)
    assert distances[i, j] > 3, (names[i], names[j])


def test_night_is_dark_but_not_too_dark():
    for place in PLACES:
        day, night = (
            postcards.render(Scene(place, time, "clear", (), 1)).mean() for time in ("day", "night")
        )
        assert 45 < night < 0.65 * day


def test_land_is_white_in_snow():
    for place in set(PLACES) - {"sea"}:
        ground = postcards.render(Scene(place, "day", "snow", (), 1))[-16:-8]
        assert ground.mean() > 215
        assert np.ptp(ground.mean((0, 1))) < 25


def test_what_falls_is_behind_the_things():
    for weather in ("rain", "snow"):
        scene = one("house", "red", weather=weather)
        mask = postcards.object_mask(scene)
        a, b = postcards.render(scene), postcards.render(replace(scene, seed=9))
        inside = ~grown(~mask)
        assert (a[inside] == b[inside]).all()
        assert (a[~mask] != b[~mask]).any()


def test_repainted_things_are_in_other_colours_and_never_in_the_one_kept_from_their_kind():
    rng, used = random.Random(0), set()
    named = np.array(list(PAINT.values()))
    for _ in range(400):
        scene = postcards.sample_scene(rng)
        paints = postcards.repaint(scene, rng)
        for group, paint in zip(scene.groups, paints, strict=True):
            nearest = list(PAINT)[np.linalg.norm(named - paint, axis=1).argmin()]
            assert nearest != group.colour
            assert not postcards.is_held_out(group.kind, nearest)
            used.add(nearest)
    assert used == set(postcards.COLOURS)
