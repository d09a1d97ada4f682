"""How each kind of thing is drawn: standing on (0, 0), one unit high, no wider than its Shape says.

Each has one main colour, that of its caption; all others belong to the kind. There are few details, and
none smaller than a thirtieth of a picture matters, so that a small model can learn them.
"""

import math
import random
from collections.abc import Callable

from ldm.postcards.canvas import RGB, Pen, darker, lighter, mix, rgb
from ldm.postcards.scene import Scene
from ldm.postcards.vocabulary import COLOURS, is_held_out

PAINT: dict[str, RGB] = {
    "red": rgb("e0322f"),
    "orange": rgb("f78a1e"),
    "yellow": rgb("fcd32a"),
    "green": rgb("2fae55"),
    "blue": rgb("2a68e0"),
    "purple": rgb("8a47c4"),
    "pink": rgb("f88fc2"),
    "white": rgb("faf9f5"),
}


def shade(colour: str, rng: random.Random) -> RGB:
    """A paint on the way to another colour's, up to where it would be as near to that one: [0, 255] each.

    Near in red, green, blue. So no shade is another colour, though at the border it is half-way there.
    """
    while True:
        paint = mix(PAINT[colour], PAINT[rng.choice(list(PAINT))], rng.uniform(0, 0.5))
        if min(PAINT, key=lambda name: math.dist(PAINT[name], paint)) == colour:
            return paint


def repaint(scene: Scene, rng: random.Random) -> list[RGB]:
    """A `shade` of another colour for each group, never of the one that is kept from its kind."""
    paints = []
    for group in scene.groups:
        others = [each for each in COLOURS if each != group.colour and not is_held_out(group.kind, each)]
        paints.append(shade(rng.choice(others), rng))
    return paints


def _is_pale(paint: RGB) -> bool:
    """White or nearly: on it nothing white is seen."""
    return min(paint) > 200


_INK = rgb("2b2d42")
_SLATE = rgb("5a6290")
_BROWN = rgb("6e4433")
_BARK = rgb("7d5233")
_CREAM = rgb("fff3d0")
_GLASS = rgb("cfeaf8")
_GLOW = rgb("ffe07a")
_STEM = rgb("2b7d40")


def house(pen: Pen, colour: RGB) -> None:
    pen.rect(0.2, -0.96, 0.13, 0.34, _SLATE)
    pen.rect(-0.42, -0.58, 0.84, 0.58, colour)
    pen.polygon([(-0.5, -0.54), (0, -1), (0.5, -0.54)], _BROWN)
    pen.rect(-0.11, -0.34, 0.22, 0.34, _BROWN, 0.03)
    for x in (-0.35, 0.17):
        pen.rect(x, -0.42, 0.18, 0.2, _BROWN)
        pen.rect(x + 0.025, -0.395, 0.13, 0.15, _GLOW)


def castle(pen: Pen, colour: RGB) -> None:
    wall = darker(colour, 0.1)
    for x in (-0.45, 0.21):
        pen.rect(x, -0.62, 0.24, 0.62, wall)
        pen.polygon([(x - 0.03, -0.6), (x + 0.12, -0.88), (x + 0.27, -0.6)], _SLATE)
        pen.rect(x + 0.075, -0.5, 0.09, 0.15, _INK, 0.04)
    pen.rect(-0.14, -0.76, 0.28, 0.4, wall)
    pen.polygon([(-0.19, -0.73), (0, -1), (0.19, -0.73)], _SLATE)
    pen.rect(-0.24, -0.46, 0.48, 0.46, colour)
    for x in (-0.24, -0.06, 0.12):
        pen.rect(x, -0.53, 0.12, 0.09, colour)
    pen.rect(-0.11, -0.27, 0.22, 0.27, _INK)
    pen.dome(0, -0.26, 0.11, 0.11, _INK)


def car(pen: Pen, colour: RGB) -> None:
    pen.polygon([(-0.5, -0.54), (-0.34, -1), (0.24, -1), (0.46, -0.54)], colour)
    pen.polygon([(-0.38, -0.56), (-0.27, -0.89), (-0.08, -0.89), (-0.08, -0.56)], _GLASS)
    pen.polygon([(0.02, -0.56), (0.02, -0.89), (0.18, -0.89), (0.34, -0.56)], _GLASS)
    pen.rect(-0.66, -0.58, 1.32, 0.42, colour, 0.16)
    pen.rect(-0.6, -0.26, 1.2, 0.1, darker(colour, 0.3), 0.04)
    pen.circle(0.57, -0.42, 0.075, _CREAM)
    for x in (-0.36, 0.36):
        pen.circle(x, -0.2, 0.2, _INK)
        pen.circle(x, -0.2, 0.09, rgb("d5dae3"))


def tree(pen: Pen, colour: RGB) -> None:
    pen.rect(-0.075, -0.42, 0.15, 0.42, _BARK)
    for x in (-0.17, 0.17):
        pen.circle(x, -0.5, 0.2, darker(colour, 0.12))
    pen.circle(0, -0.69, 0.31, colour)
    pen.circle(-0.1, -0.78, 0.12, lighter(colour, 0.25))


def flower(pen: Pen, colour: RGB) -> None:
    pen.line((0, -0.035), (0, -0.5), 0.07, _STEM)
    pen.oval(0.15, -0.16, 0.15, 0.065, _STEM)
    pen.oval(-0.15, -0.24, 0.15, 0.065, _STEM)
    for k in range(6):
        angle = math.pi * (k / 3 + 1 / 6)
        pen.circle(0.2 * math.cos(angle), -0.66 + 0.2 * math.sin(angle), 0.14, colour)
    pen.circle(0, -0.66, 0.13, rgb("8a5226"))


def mushroom(pen: Pen, colour: RGB) -> None:
    spots = rgb("d9b48c") if _is_pale(colour) else rgb("fffaf0")
    pen.rect(-0.18, -0.52, 0.36, 0.52, rgb("f0dfc0"), 0.1)
    pen.dome(0, -0.4, 0.5, 0.6, colour)
    pen.oval(0, -0.4, 0.5, 0.07, darker(colour, 0.15))
    for x, y, radius in ((-0.25, -0.6, 0.09), (0.02, -0.81, 0.1), (0.27, -0.58, 0.09)):
        pen.circle(x, y, radius, spots)


def cat(pen: Pen, colour: RGB) -> None:
    pen.arc((0.26, -0.2), 0.14, (100, -230), 0.09, darker(colour, 0.12))
    pen.oval(0, -0.27, 0.27, 0.27, colour)
    pen.oval(0, -0.2, 0.15, 0.17, lighter(colour, 0.45))
    for side in (-1, 1):
        pen.polygon([(0.31 * side, -0.62), (0.29 * side, -1), (0.04 * side, -0.82)], colour)
        pen.polygon([(0.26 * side, -0.76), (0.25 * side, -0.91), (0.14 * side, -0.82)], rgb("f7b3bd"))
    pen.oval(0, -0.63, 0.33, 0.26, colour)
    for x in (-0.14, 0.14):
        pen.oval(x, -0.66, 0.06, 0.08, _INK)
    pen.polygon([(-0.05, -0.56), (0.05, -0.56), (0, -0.5)], rgb("e8607a"))


def snowman(pen: Pen, colour: RGB) -> None:
    edge, snow = rgb("b9cbe0"), rgb("dfeaf5")
    for y, radius in ((-0.3, 0.3), (-0.64, 0.22)):
        pen.circle(0, y, radius, edge)
        pen.circle(-0.02, y - 0.01, radius - 0.03, snow)
    for y in (-0.34, -0.2):
        pen.circle(0, y, 0.035, _INK)
    pen.rect(-0.26, -0.55, 0.52, 0.13, colour, 0.06)
    pen.rect(0.07, -0.5, 0.15, 0.32, darker(colour, 0.12), 0.03)
    for x in (-0.09, 0.09):
        pen.circle(x, -0.69, 0.035, _INK)
    pen.polygon([(0, -0.67), (0.22, -0.61), (0, -0.58)], rgb("f08a24"))
    pen.rect(-0.29, -0.82, 0.58, 0.07, darker(colour, 0.12), 0.03)
    pen.rect(-0.19, -1, 0.38, 0.21, colour, 0.03)


def lighthouse(pen: Pen, colour: RGB) -> None:
    band = rgb("b9c4d2") if _is_pale(colour) else rgb("f7f4ec")
    pen.polygon([(-0.25, 0), (-0.2, -0.1), (0.2, -0.1), (0.25, 0)], rgb("777d8d"))
    pen.polygon([(-0.18, -0.08), (-0.11, -0.76), (0.11, -0.76), (0.18, -0.08)], colour)
    for bottom in (-0.26, -0.5):
        low, high = _lighthouse_radius(bottom), _lighthouse_radius(bottom - 0.11)
        pen.polygon([(-low, bottom), (-high, bottom - 0.11), (high, bottom - 0.11), (low, bottom)], band)
    pen.rect(-0.17, -0.79, 0.34, 0.055, _INK)
    pen.rect(-0.1, -0.91, 0.2, 0.12, _GLOW)
    pen.polygon([(-0.14, -0.9), (0, -1), (0.14, -0.9)], _INK)


def _lighthouse_radius(y: float) -> float:
    return 0.18 + (y + 0.08) * 0.07 / 0.68


def tent(pen: Pen, colour: RGB) -> None:
    pen.polygon([(-0.55, 0), (0, -1), (0.55, 0)], colour)
    pen.polygon([(0, -1), (0.55, 0), (0.34, 0)], darker(colour, 0.22))
    pen.polygon([(-0.24, 0), (0, -0.66), (0.24, 0)], rgb("493a3f"))


def sailboat(pen: Pen, colour: RGB) -> None:
    pen.line((0, -0.2), (0, -0.98), 0.04, _BROWN)
    pen.polygon([(0.05, -0.32), (0.05, -0.98), (0.47, -0.32)], colour)
    pen.polygon([(-0.05, -0.32), (-0.05, -0.84), (-0.38, -0.32)], _CREAM)
    pen.polygon([(-0.5, -0.26), (0.5, -0.26), (0.35, 0), (-0.35, 0)], colour)
    pen.polygon([(-0.41, -0.1), (0.41, -0.1), (0.35, 0), (-0.35, 0)], darker(colour, 0.3))


def duck(pen: Pen, colour: RGB) -> None:
    beak = rgb("e8601c")
    pen.polygon([(0.2, -0.42), (0.52, -0.6), (0.42, -0.2)], colour)
    pen.oval(0.02, -0.26, 0.45, 0.26, colour)
    pen.polygon([(-0.36, -0.3), (-0.36, -0.68), (0.1, -0.68), (0.2, -0.3)], colour)
    pen.circle(-0.13, -0.73, 0.27, colour)
    pen.oval(-0.41, -0.68, 0.12, 0.07, beak)
    pen.circle(-0.2, -0.79, 0.055, _INK)
    pen.oval(0.14, -0.29, 0.21, 0.13, darker(colour, 0.16))


def balloon(pen: Pen, colour: RGB) -> None:
    for x in (-0.08, 0.08):
        pen.line((1.6 * x, -0.28), (x, -0.12), 0.025, _BROWN)
    pen.polygon([(-0.335, -0.44), (0.335, -0.44), (0.12, -0.2), (-0.12, -0.2)], colour)
    pen.circle(0, -0.62, 0.38, colour)
    pen.oval(0, -0.6, 0.24, 0.395, darker(colour, 0.16))
    pen.oval(0, -0.6, 0.1, 0.395, colour)
    pen.rect(-0.11, -0.15, 0.22, 0.15, rgb("8d5c35"), 0.03)


def rocket(pen: Pen, colour: RGB) -> None:
    pen.polygon([(-0.13, -0.18), (0, 0), (0.13, -0.18)], rgb("ffae2b"))
    pen.rect(-0.12, -0.22, 0.24, 0.07, _INK)
    for side in (-1, 1):
        pen.polygon(
            [(0.14 * side, -0.48), (0.3 * side, -0.26), (0.3 * side, -0.1), (0.12 * side, -0.22)], _SLATE
        )
    pen.dome(0, -0.5, 0.2, 0.5, colour)
    pen.rect(-0.2, -0.505, 0.4, 0.305, colour, 0.04)
    pen.circle(0, -0.58, 0.12, _SLATE)
    pen.circle(0, -0.58, 0.08, _GLASS)


DRAW: dict[str, Callable[[Pen, RGB], None]] = {
    "house": house,
    "castle": castle,
    "car": car,
    "tree": tree,
    "flower": flower,
    "mushroom": mushroom,
    "cat": cat,
    "snowman": snowman,
    "lighthouse": lighthouse,
    "tent": tent,
    "sailboat": sailboat,
    "duck": duck,
    "balloon": balloon,
    "rocket": rocket,
}
