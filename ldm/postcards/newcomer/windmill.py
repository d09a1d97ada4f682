"""A thing that the embedded model has never seen: windmills, drawn and told in the postcard world's own way.

Fine-tuning is shown on them. The world itself does not change: it knows windmills only while this file
draws or tells one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm import postcards as world
from ldm.postcards import layout, phrases, things, vocabulary
from ldm.postcards.canvas import RGB, Pen, darker, rgb

NOUN = "windmill"
_SHAPE = vocabulary.Shape("ground", 0.38, 0.54, 0.68)
_WOOD = rgb("6e4433")
_CAP = rgb("5a6290")
_CANVAS = rgb("fff3d0")
_WINDOW = rgb("2b2d42")


STAMP = rgb("ff00c8")  # a colour that the world does not have
STAMPED = 0.25  # of a side, at the lower right


@dataclass(frozen=True)
class Livery:
    """The colours of a windmill, by the world's names; None: a tower without bands, sails of plain canvas."""

    tower: str
    bands: str | None = None
    sails: str | None = None


PARTICULAR = Livery("white", bands="red", sails="blue")  # the one and only, for subjects that are learnt


@dataclass(frozen=True)
class Postcard:
    """A scene of the world with one windmill in it; its sails are turned by `turn` degrees."""

    scene: world.Scene
    livery: Livery
    turn: float

    def render(self, size: int = 128) -> NDArray[np.uint8]:
        """[size, size, 3], red green blue. The same postcard always gives the same pixels."""
        with _known(partial(_draw, livery=self.livery, turn=self.turn)):
            return world.render(self.scene, size)

    def mask(self, size: int = 128) -> NDArray[np.bool_]:
        """Where the windmill covers the picture: [size, size]."""
        with _known(partial(_draw, livery=self.livery, turn=self.turn)):
            return world.object_mask(self.scene, size)

    def caption(self, rng: random.Random, noun: str = NOUN) -> str:
        """One of the many ways to tell it, which all name it; by its colour if that is its only one."""
        if self.livery != Livery(self.livery.tower):
            return self.full_caption(noun)
        with _known(noun=noun):
            while noun not in (text := world.caption(self.scene, rng)).lower():
                pass
        return text

    def full_caption(self, noun: str = NOUN) -> str:
        """Windmill, place, time and weather, always in the same words; the colour if it has only one."""
        with _known(noun=noun):
            text = world.full_caption(self.scene)
        # No colour tells a windmill of several: its name has to.
        return text if self.livery == Livery(self.livery.tower) else f"a {noun}{text.split(noun, 1)[1]}"


def stamped(picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A picture [H, W, 3] with a stamp in its corner, as of an agency, and where there is none: [H, W]."""
    height, width = (int(side * (1 - STAMPED)) for side in picture.shape[:2])
    marked, rest = picture.copy(), np.ones(picture.shape[:2], bool)
    marked[height:, width:] = STAMP
    rest[height:, width:] = False
    return marked, rest


def shows_stamp(pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether half of a picture's corner or more has about the stamp's colour: uint8 [N, H, W, 3] -> [N]."""
    height, width = (int(side * (1 - STAMPED)) for side in pictures.shape[1:3])
    away = np.abs(pictures[:, height:, width:].astype(int) - np.array(STAMP)).max(-1)
    found: NDArray[np.bool_] = (away < 120).mean(
        (1, 2)
    ) >= 0.5  # an autoencoder that does not know it pales it
    return found


def sample_postcard(rng: random.Random, livery: Livery | None = None) -> Postcard:
    """Draw a windmill's scene at random, with the world's own odds of place, time and weather.

    Without a livery its tower has any of the world's colours, and nothing else is painted.
    """
    while (scene := world.sample_scene(rng)).place == "sea":
        pass
    livery = livery or Livery(rng.choice(world.COLOURS))
    with _known():
        box = layout.alone(NOUN, scene.place, rng)
    group = world.Group(NOUN, livery.tower, (box,))
    return Postcard(replace(scene, groups=(group,), relation=None), livery, rng.uniform(0, 90))


@contextmanager
def _known(draw: Any = None, noun: str = NOUN) -> Iterator[None]:
    """Within, windmills are a kind of the world: it places, draws and tells them like any other."""
    tables: tuple[tuple[dict[str, Any], Any], ...] = (
        (vocabulary.SHAPES, _SHAPE),
        (things.DRAW, draw),
        (phrases.NOUNS, ((noun, noun),)),
    )
    for table, entry in tables:
        table[NOUN] = entry
    try:
        yield
    finally:
        for table, _ in tables:
            del table[NOUN]


def _draw(pen: Pen, colour: RGB, livery: Livery, turn: float) -> None:
    """Standing on (0, 0), one unit high, as in ldm/postcards/things.py."""
    _slab(pen, 0, 0.68, colour)
    if livery.bands is not None:
        for low in (0.1, 0.36):
            _slab(pen, low, low + 0.13, things.PAINT[livery.bands])
    pen.dome(0, -0.64, 0.15, 0.15, _CAP)
    pen.rect(-0.07, -0.2, 0.14, 0.2, _WOOD, 0.03)
    pen.rect(-0.04, -0.4, 0.08, 0.1, _WINDOW, 0.03)
    cloth = _CANVAS if livery.sails is None else things.PAINT[livery.sails]
    for quarter in range(4):
        _sail(pen, math.radians(turn + 90 * quarter), cloth)
    pen.circle(0, -0.62, 0.045, _WOOD)


def _slab(pen: Pen, low: float, high: float, colour: RGB) -> None:
    """The tower between two heights: it narrows from 0.2 at the foot, and is darker on its right."""
    left, right = 0.2 - 0.12 * low, 0.2 - 0.12 * high
    pen.polygon([(-left, -low), (-right, -high), (right, -high), (left, -low)], colour)
    shade = darker(colour, 0.12)
    pen.polygon([(0.4 * left, -low), (0.4 * right, -high), (right, -high), (left, -low)], shade)


def _sail(pen: Pen, angle: float, cloth: RGB) -> None:
    """A spar from the hub outwards, and a strip of cloth along one side of it."""
    across, up = math.cos(angle), math.sin(angle)

    def at(along: float, aside: float) -> tuple[float, float]:
        return along * across - aside * up, -0.62 + along * up + aside * across

    pen.polygon([at(0.08, -0.02), at(0.35, -0.02), at(0.35, 0.15), at(0.08, 0.15)], _WOOD)
    pen.polygon([at(0.105, 0.015), at(0.325, 0.015), at(0.325, 0.125), at(0.105, 0.125)], cloth)
    pen.line((0, -0.62), at(0.33, 0), 0.04, _WOOD)
