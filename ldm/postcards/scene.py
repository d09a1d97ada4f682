"""A scene is what is in a picture: sampled and labelled here, drawn by picture.py, told by captions.py."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldm.postcards import layout
from ldm.postcards.layout import Box
from ldm.postcards.vocabulary import (
    COLOURS,
    KINDS,
    PLACES,
    SHAPES,
    TIMES,
    WEATHERS,
    held_out_colour,
    is_held_out,
    places_for,
)

# How often a scene has: nothing, one thing, two or three of a kind, two different things.
_COMPOSITIONS: Mapping[str, float] = {"empty": 6, "one": 64, "two": 12, "three": 6, "pair": 12}
# What may be weighted: of pairs also those beside each other and those above each other.
COMPOSITIONS = (*_COMPOSITIONS, "beside", "stacked")
_HELD_OUT_COMPOSITIONS = {"one": 75, "pair": 25}
_WEATHER_WEIGHTS = {"clear": 40, "cloudy": 20, "rain": 20, "snow": 20}
_SAME_COLOUR = 0.2  # of pairs of different things

_LEFT, _RIGHT, _MIDDLE = 0.38, 0.62, (0.44, 0.56)
POSITIONS = ("left", "middle", "right")


@dataclass(frozen=True)
class Group:
    """One to three things of one kind and colour, from left to right."""

    kind: str
    colour: str
    boxes: tuple[Box, ...]

    @property
    def count(self) -> int:
        return len(self.boxes)

    @property
    def x(self) -> float:
        """Mean centre of the things, from the left."""
        return sum(box.x for box in self.boxes) / len(self.boxes)

    @property
    def y(self) -> float:
        """Mean centre of the things, from the top."""
        return sum(box.y for box in self.boxes) / len(self.boxes)

    @property
    def position(self) -> str | None:
        """One of POSITIONS where it is clearly that, else None."""
        if self.x < _LEFT:
            return "left"
        if self.x > _RIGHT:
            return "right"
        return "middle" if _MIDDLE[0] <= self.x <= _MIDDLE[1] else None


@dataclass(frozen=True)
class Scene:
    """Everything in one picture.

    `relation`, one of RELATIONS, says that the first of two groups is left of, or above, the second.
    `seed` drives what no caption speaks of (hills, clouds, stars), so that a scene is always the same pixels.
    """

    place: str
    time: str
    weather: str
    groups: tuple[Group, ...]
    seed: int
    relation: str | None = None


@dataclass(frozen=True)
class Labels:
    """A scene as numbers; K = len(KINDS), indices into KINDS, COLOURS, PLACES, TIMES, WEATHERS, POSITIONS."""

    count: npt.NDArray[np.int64]  # [K], 0 to 3
    colour: npt.NDArray[np.int64]  # [K], -1 where absent
    x: npt.NDArray[np.float32]  # [K], centre, 0 to 1, nan where absent
    y: npt.NDArray[np.float32]  # [K]
    position: npt.NDArray[np.int64]  # [K], -1 where absent or not clearly one
    place: int
    time: int
    weather: int


def sample_scene(
    rng: random.Random, *, held_out: bool = False, compositions: Mapping[str, float] | None = None
) -> Scene:
    """Draw a scene at random, with the weights of `compositions` (keys: COMPOSITIONS) where they are given.

    Without `held_out` no group has a pair of kind and colour that `is_held_out`; with it exactly one has, if
    there is any.
    """
    composition = choose(rng, compositions or (_HELD_OUT_COMPOSITIONS if held_out else _COMPOSITIONS))
    if composition == "empty":
        return _finish(rng, rng.choice(PLACES), ())
    if composition in ("pair", "beside", "stacked"):
        stacked = rng.random() < 0.5 if composition == "pair" else composition == "stacked"
        return _sample_pair(rng, held_out, stacked)
    kind = rng.choice(KINDS)
    place = _sample_place(rng, kind)
    colour = held_out_colour(kind) if held_out else _sample_colour(rng, kind)
    if composition == "one":
        boxes: tuple[Box, ...] = (layout.alone(kind, place, rng),)
    else:
        boxes = layout.row([kind] * (2 if composition == "two" else 3), place, rng)
    return _finish(rng, place, (Group(kind, colour, boxes),))


def encode_labels(scene: Scene) -> Labels:
    """The scene as numbers, for training and measuring classifiers."""
    n = len(KINDS)
    count, colour, position = np.zeros(n, np.int64), np.full(n, -1), np.full(n, -1)
    x, y = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
    for group in scene.groups:
        k = KINDS.index(group.kind)
        count[k], colour[k] = group.count, COLOURS.index(group.colour)
        x[k], y[k] = group.x, group.y
        if group.position is not None:
            position[k] = POSITIONS.index(group.position)
    place, time, weather = (
        PLACES.index(scene.place),
        TIMES.index(scene.time),
        WEATHERS.index(scene.weather),
    )
    return Labels(count, colour, x, y, position, place, time, weather)


def _sample_pair(rng: random.Random, held_out: bool, stacked: bool) -> Scene:
    if stacked:
        relation = "above"
        first = rng.choice([kind for kind in KINDS if SHAPES[kind].realm == "air"])
        second = rng.choice([kind for kind in KINDS if SHAPES[kind].realm != "air"])
        # The strip of water at the beach is too high in the picture for anything above a boat.
        place = "sea" if SHAPES[second].realm == "water" else _sample_place(rng, second)
        above, below = layout.stacked(first, second, rng)
        boxes = (above, below)
    else:
        relation = "left of"
        first = rng.choice(KINDS)
        place = _sample_place(rng, first)
        second = rng.choice([kind for kind in KINDS if kind != first and place in places_for(kind)])
        if rng.random() < 0.5:
            first, second = second, first
        left, right = layout.row([first, second], place, rng)
        boxes = (left, right)
    colours = _sample_two_colours(rng, first, second, held_out)
    groups = (Group(first, colours[0], boxes[:1]), Group(second, colours[1], boxes[1:]))
    return _finish(rng, place, groups, relation)


def _sample_two_colours(rng: random.Random, first: str, second: str, held_out: bool) -> tuple[str, str]:
    unusual = rng.randrange(2) if held_out else None
    a = held_out_colour(first) if unusual == 0 else _sample_colour(rng, first)
    b = held_out_colour(second) if unusual == 1 else _sample_colour(rng, second)
    if unusual is not None or rng.random() >= _SAME_COLOUR:
        while a == b:
            a = a if unusual == 0 else _sample_colour(rng, first)
            b = b if unusual == 1 else _sample_colour(rng, second)
        return a, b
    shared = [c for c in COLOURS if not is_held_out(first, c) and not is_held_out(second, c)]
    a = rng.choice(shared)
    return a, a


def _sample_colour(rng: random.Random, kind: str) -> str:
    return rng.choice([colour for colour in COLOURS if not is_held_out(kind, colour)])


def _sample_place(rng: random.Random, kind: str) -> str:
    # Few kinds can be at sea, so those that can are there more often.
    return choose(rng, {place: 2 if place == "sea" else 1 for place in places_for(kind)})


def _finish(rng: random.Random, place: str, groups: tuple[Group, ...], relation: str | None = None) -> Scene:
    time, weather = rng.choice(TIMES), choose(rng, _WEATHER_WEIGHTS)
    return Scene(place, time, weather, groups, rng.getrandbits(32), relation)


def choose(rng: random.Random, weights: Mapping[str, float]) -> str:
    """One of the names, as often as its weight says."""
    return rng.choices(list(weights), list(weights.values()))[0]
