"""A scene of sprites: what is in a picture, sampled here, drawn by picture.py, told by captions.py.

Besides the places of the postcards there are a table, for small things, and a plain background of one colour.
Three kinds of combination are kept from training, to measure how things compose: a thing and a colour, a
thing and a place, a thing and a style.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ldm.postcards import scene as postcards
from ldm.postcards.layout import Box
from ldm.postcards.sprites import layout
from ldm.postcards.sprites.atlas import Thing, load_things
from ldm.postcards.sprites.colour import BACKDROPS, backdrop
from ldm.postcards.vocabulary import COLOURS, TIMES
from ldm.postcards.vocabulary import PLACES as LANDSCAPES

TABLE, PLAIN = "table", "plain"
PLACES = (*LANDSCAPES, TABLE, PLAIN)
SIZES = ("small", "big")
COMPOSITIONS = ("one", "two", "three", "beside", "stacked")
Unseen = Literal["colour", "place", "style"]

_COMPOSITIONS: Mapping[str, float] = {"one": 56, "two": 9, "three": 7, "beside": 18, "stacked": 10}
_UNSEEN_COMPOSITIONS: Mapping[str, float] = {"one": 75, "beside": 25}
_SIZED = 0.2  # of single things are said to be big or small
_PAINTED = 0.5  # of things that can be
_WEATHER_WEIGHTS = {"clear": 40, "cloudy": 20, "rain": 20, "snow": 20}
_LAND = tuple(place for place in LANDSCAPES if place != "sea")
# Where each realm is, and how often.
_PLACES: dict[str, dict[str, float]] = {
    "ground": {PLAIN: 2, **dict.fromkeys(_LAND, 1.2)},
    "air": {PLAIN: 2, **dict.fromkeys(LANDSCAPES, 1)},
    "water": {PLAIN: 2, "sea": 5, "beach": 3},
    "table": {TABLE: 4, PLAIN: 3, **dict.fromkeys(_LAND, 0.5)},
    "food": {TABLE: 4, PLAIN: 3, **dict.fromkeys(_LAND, 0.3)},
    "portrait": {PLAIN: 3, **dict.fromkeys(_LAND, 1)},
    "icon": {PLAIN: 1},
}
_DISTINCT = 120  # least distance of a thing's mean colour from the background, in red, green, blue


@dataclass(frozen=True)
class Group:
    """One to three equal things, from left to right."""

    thing: Thing
    colour: str | None  # None: as the artist painted it
    boxes: tuple[Box, ...]
    flipped: bool

    @property
    def count(self) -> int:
        return len(self.boxes)

    @property
    def position(self) -> str | None:
        """Where it is, one of the postcards' POSITIONS, where it is clearly there."""
        return postcards.Group("", "", self.boxes).position


@dataclass(frozen=True)
class Scene:
    """Everything in one picture.

    `relation`, "left of" or "above", says how the first of two groups stands to the second. `backdrop` is the
    colour of a plain background or of the wall behind a table; there are neither hours nor weathers there.
    `size` is "small", "big" or "" of a single thing. `seed` drives what no caption speaks of.
    """

    style: str
    place: str
    time: str
    weather: str
    groups: tuple[Group, ...]
    seed: int
    relation: str | None = None
    size: str = ""
    backdrop: str = "white"

    @property
    def outdoors(self) -> bool:
        return self.place not in (TABLE, PLAIN)

    def postcard(self) -> postcards.Scene:
        """Its landscape, for those who draw and tell postcards; a group says only where things are."""
        boxes = tuple(box for group in self.groups for box in group.boxes)
        groups = (postcards.Group("", "", boxes),)
        return postcards.Scene(self.place, self.time, self.weather, groups, self.seed)


@dataclass(frozen=True)
class World:
    """The things that scenes are made of, and in which styles."""

    things: Sequence[Thing]
    styles: Sequence[str]
    flying: Sequence[Thing] = field(init=False)
    standing: Sequence[Thing] = field(init=False)

    def __post_init__(self) -> None:
        flying = [thing for thing in self.things if thing.realm == "air"]
        standing = [thing for thing in self.things if thing.realm in ("ground", "water", "table", "food")]
        object.__setattr__(self, "flying", flying)
        object.__setattr__(self, "standing", standing)


def make_world(count: int | None = None, styles: Sequence[str] = ("flat", "3d")) -> World:
    """The `count` most usual things (all if None) in some styles."""
    return World(load_things()[:count], tuple(styles))


# --- what is kept from training ----------------------------------------------------------------------------


def unseen_colour(thing: Thing) -> str:
    """The one colour in which this thing is never shown in training."""
    return COLOURS[(3 * thing.number + 5) % len(COLOURS)]


def unseen_place(thing: Thing) -> str | None:
    """The one landscape in which it is never shown; None for what is at few places."""
    places = [place for place in _PLACES[thing.realm] if place in LANDSCAPES]
    return places[(5 * thing.number + 2) % len(places)] if len(places) > 2 else None


def unseen_style(thing: Thing) -> str | None:
    """The style in which it is never shown: every tenth thing lacks one."""
    return ("flat", "3d")[thing.number // 10 % 2] if thing.number % 10 == 3 else None


# --- sampling ----------------------------------------------------------------------------------------------


def sample_scene(
    world: World,
    rng: random.Random,
    *,
    unseen: Unseen | None = None,
    compositions: Mapping[str, float] | None = None,
) -> Scene:
    """Draw a scene at random.

    Without `unseen` it has no combination that is kept from training; with it the first thing has one of that
    kind, and no other.
    """
    composition = postcards.choose(rng, compositions or (_UNSEEN_COMPOSITIONS if unseen else _COMPOSITIONS))
    while True:  # few tries: not every thing has everything
        style = rng.choice(world.styles)
        first = rng.choice(world.flying if composition == "stacked" and not unseen else world.things)
        if unseen == "style":
            style = unseen_style(first) or ""
        elif unseen_style(first) == style:
            continue
        if (unseen == "colour" and not first.sprites[style].paintable) or style not in world.styles:
            continue
        place = _sample_place(rng, first, unseen == "place")
        if place is None:
            continue
        scene = _compose(world, rng, composition, style, place, first, unseen)
        if scene is not None:
            return scene


def _compose(
    world: World,
    rng: random.Random,
    composition: str,
    style: str,
    place: str,
    first: Thing,
    unseen: Unseen | None,
) -> Scene | None:
    colour = unseen_colour(first) if unseen == "colour" else _sample_colour(rng, first, style)
    relation, size, second = None, "", None
    if composition in ("beside", "stacked"):
        second = _sample_second(world, rng, style, place, first, composition == "stacked")
        if second is None:
            return None
        relation = "above" if composition == "stacked" else "left of"
    elif composition != "one" and first.plural is None:
        return None
    elif composition == "one" and first.realm != "portrait" and rng.random() < _SIZED:
        size = rng.choice(SIZES)
    things = [first] * {"two": 2, "three": 3}.get(composition, 1) + ([second] if second else [])
    spots = [layout.Spot(thing.sprites[style].aspect, thing.realm, thing.big) for thing in things]
    if relation == "above":
        boxes = layout.stacked(spots, place, rng)
    elif len(spots) > 1:
        boxes = layout.row(spots, place, rng)
    else:
        boxes = (layout.alone(spots[0], place, size, rng),)
    if second is None:
        groups: tuple[Group, ...] = (Group(first, colour, boxes, rng.random() < 0.4),)
    else:
        groups = (
            Group(first, colour, boxes[:1], rng.random() < 0.4),
            Group(second, _sample_colour(rng, second, style), boxes[1:], rng.random() < 0.4),
        )
        if relation == "left of" and rng.random() < 0.5:
            groups = _swapped(groups, spots, place, rng)
    back = _sample_backdrop(rng, groups, style)
    if back is None:
        return None
    outdoors = place not in (TABLE, PLAIN)
    time = rng.choice(TIMES) if outdoors else "day"
    weather = postcards.choose(rng, _WEATHER_WEIGHTS) if outdoors else "clear"
    return Scene(style, place, time, weather, groups, rng.getrandbits(32), relation, size, back)


def _swapped(
    groups: tuple[Group, ...], spots: Sequence[layout.Spot], place: str, rng: random.Random
) -> tuple[Group, ...]:
    """The second thing on the left, so that what was chosen first is on both sides equally often."""
    left, right = layout.row(spots[::-1], place, rng)
    first, second = groups
    return (
        Group(second.thing, second.colour, (left,), second.flipped),
        Group(first.thing, first.colour, (right,), first.flipped),
    )


def _sample_place(rng: random.Random, thing: Thing, unseen: bool) -> str | None:
    away = unseen_place(thing)
    if unseen:
        return away
    return postcards.choose(rng, {place: n for place, n in _PLACES[thing.realm].items() if place != away})


def _sample_second(
    world: World, rng: random.Random, style: str, place: str, first: Thing, stacked: bool
) -> Thing | None:
    """Another thing that can be there too; heads and busts only with their kind, or on a plain background."""
    for _ in range(20):
        second = rng.choice(world.standing if stacked else world.things)
        together = place == PLAIN or (second.realm == "portrait") == (first.realm == "portrait")
        fits = place in _PLACES[second.realm] and place != unseen_place(second)
        # The strip of water at the beach is too high in the picture for anything above it.
        fits &= not (stacked and place == "beach" and second.realm == "water")
        if second is not first and together and fits and unseen_style(second) != style:
            return second
    return None


def _sample_colour(rng: random.Random, thing: Thing, style: str) -> str | None:
    if not thing.sprites[style].paintable or rng.random() >= _PAINTED:
        return None
    return rng.choice([colour for colour in COLOURS if colour != unseen_colour(thing)])


def _sample_backdrop(rng: random.Random, groups: Sequence[Group], style: str) -> str | None:
    """A background that none of the things is lost on; None if there is none."""
    names = [
        name
        for name in BACKDROPS
        if all(
            name != group.colour
            if group.colour
            else math.dist(group.thing.sprites[style].mean, backdrop(name)) > _DISTINCT
            for group in groups
        )
    ]
    return rng.choice(names) if names else None
