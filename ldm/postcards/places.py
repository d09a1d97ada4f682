"""How each place is drawn, below its horizon and a little above."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from ldm.postcards.canvas import RGB, Pen, Point, mix, rgb
from ldm.postcards.vocabulary import HORIZON, SHORE

_SNOW = rgb("eaf2fa")


@dataclass(frozen=True)
class Backdrop:
    """What a place needs to be drawn: `pen` takes the light of the hour, `light` shines by itself."""

    pen: Pen
    light: Pen
    rng: random.Random
    snowy: bool
    night: bool

    def ground(self, colour: str, amount: float = 0.94) -> RGB:
        """The colour, under snow if there is snow."""
        return mix(rgb(colour), _SNOW, amount) if self.snowy else rgb(colour)

    def hills(self, y: float, height: float, colour: RGB) -> None:
        """A smooth rolling line, and all below it."""
        phase, waves = self.rng.uniform(0, 6.28), self.rng.uniform(0.8, 1.4)
        top = [(i / 16, y + height * math.sin(6.28 * waves * i / 16 + phase)) for i in range(17)]
        self.below(top, colour)

    def below(self, top: list[Point], colour: RGB) -> None:
        self.pen.polygon([(0, 1.01), *top, (1, 1.01)], colour)


def sea(b: Backdrop) -> None:
    horizon = HORIZON["sea"]
    b.pen.rect(0, horizon, 1, 0.5, rgb("3f9bd6"))
    b.pen.rect(0, horizon + 0.12, 1, 0.5, rgb("3289c6"))
    b.pen.rect(0, horizon + 0.27, 1, 0.5, rgb("2777b4"))
    for k in range(8):
        x, y = (k * 3 % 8 + b.rng.uniform(0, 0.7)) / 8, horizon + 0.06 + 0.05 * k
        if b.snowy and k % 2:
            b.pen.oval(x, y + 0.02, 0.09, 0.022, rgb("f0f6fb"))
        else:
            b.pen.rect(x - 0.07, y, 0.15, 0.012, rgb("8fcdee"), 0.006)


def beach(b: Backdrop) -> None:
    horizon = HORIZON["beach"]
    b.pen.rect(0, horizon, 1, 0.4, rgb("3fa9d8"))
    b.pen.rect(0, horizon + 0.1, 1, 0.4, rgb("45b8da"))
    for k in range(4):
        x, y = (k * 3 % 4 + b.rng.uniform(0, 0.7)) / 4, horizon + 0.04 + 0.055 * k
        b.pen.rect(x - 0.07, y, 0.15, 0.012, rgb("a9e0f0"), 0.006)
    phase = b.rng.uniform(0, 6.28)
    for lift, colour in ((0.03, rgb("f2fbfd")), (0.0, b.ground("f3d999", 0.8))):
        b.below([(i / 16, SHORE - lift + 0.012 * math.sin(8 * i / 16 + phase)) for i in range(17)], colour)


def meadow(b: Backdrop) -> None:
    horizon = HORIZON["meadow"]
    b.hills(horizon - 0.03, 0.045, b.ground("b5dc82", 0.7))
    b.hills(horizon + 0.05, 0.035, b.ground("93cc66", 0.8))
    b.hills(horizon + 0.15, 0.02, b.ground("7abb55"))


def mountains(b: Backdrop) -> None:
    horizon = HORIZON["mountains"]
    for x, width, height in ((0.1, 0.34, 0.3), (0.88, 0.36, 0.33), (0.48, 0.4, 0.45)):
        _peak(b, x + b.rng.uniform(-0.06, 0.06), width, height + b.rng.uniform(-0.03, 0.03))
    b.hills(horizon, 0.015, b.ground("6fae62", 0.75))
    b.hills(horizon + 0.12, 0.02, b.ground("5c9f52"))


def _peak(b: Backdrop, x: float, half: float, height: float) -> None:
    foot = HORIZON["mountains"] + 0.03
    top, cap = foot - height, 0.36
    b.pen.polygon([(x - half, foot), (x, top), (x + half, foot)], rgb("7f94ba"))
    b.pen.polygon([(x, top), (x + half, foot), (x + 0.3 * half, foot)], rgb("6a80a8"))
    edge = top + cap * height
    snow = [(x - cap * half, edge), (x, top), (x + cap * half, edge)]
    b.pen.polygon([*snow, (x + 0.1 * half, edge - 0.05), (x - 0.06 * half, edge + 0.03)], rgb("f3f7fb"))


def forest(b: Backdrop) -> None:
    horizon = HORIZON["forest"]
    for foot, height, colour, n in ((horizon, 0.38, "6fa583", 7), (horizon + 0.06, 0.4, "3f7d5b", 6)):
        shift = b.rng.uniform(-0.5, 0.5)
        for i in range(-1, n + 1):
            x = (i + 0.5 + shift + b.rng.uniform(-0.12, 0.12)) / n
            _pine(b, x, foot, height * b.rng.uniform(0.88, 1.1), b.ground(colour, 0.4))
    b.hills(horizon + 0.05, 0.01, b.ground("69a654"))


def _pine(b: Backdrop, x: float, foot: float, height: float, colour: RGB) -> None:
    for rise, half in ((0.0, 0.26), (0.28, 0.2), (0.52, 0.14)):
        y = foot - rise * height
        b.pen.polygon([(x - half * height, y), (x, y - 0.48 * height), (x + half * height, y)], colour)


def desert(b: Backdrop) -> None:
    horizon = HORIZON["desert"]
    left = b.rng.random() < 0.5
    _butte(b, b.rng.uniform(0.12, 0.26) if left else b.rng.uniform(0.74, 0.88), 0.15, 0.2)
    _butte(b, b.rng.uniform(0.62, 0.8) if left else b.rng.uniform(0.2, 0.38), 0.11, 0.12)
    b.hills(horizon - 0.01, 0.03, b.ground("f0c27c", 0.35))
    b.hills(horizon + 0.07, 0.03, b.ground("e9b265", 0.7))
    _cactus(b, b.rng.choice((0.06, 0.94)), 0.84, 0.2)
    b.hills(horizon + 0.17, 0.02, b.ground("e0a253"))


def _butte(b: Backdrop, x: float, half: float, height: float) -> None:
    foot = HORIZON["desert"] + 0.03
    top = foot - height
    b.pen.polygon(
        [(x - half, foot), (x - 0.6 * half, top), (x + 0.6 * half, top), (x + half, foot)], rgb("c4683f")
    )
    b.pen.rect(x - 0.6 * half, top, 1.2 * half, 0.03, b.ground("d98a57"))


def _cactus(b: Backdrop, x: float, foot: float, height: float) -> None:
    green = rgb("4f8f58")
    b.pen.line((x, foot), (x, foot - height), 0.035, green)
    for side, y in ((-1, 0.45), (1, 0.6)):
        elbow = (x + 0.05 * side, foot - y * height)
        b.pen.line((x, elbow[1]), elbow, 0.025, green)
        b.pen.line(elbow, (elbow[0], elbow[1] - 0.05), 0.025, green)


def city(b: Backdrop) -> None:
    horizon = HORIZON["city"]
    _buildings(b, 6, (0.34, 0.5), rgb("b3c1d6"), windows=False)
    _buildings(b, 4, (0.22, 0.36), rgb("8798b8"), windows=True)
    b.pen.rect(0, horizon, 1, 0.3, b.ground("c3c7cf"))
    b.pen.rect(0, horizon + 0.07, 1, 0.3, b.ground("6e7482", 0.8))
    for k in range(4):
        b.pen.rect(0.06 + 0.25 * k, 0.955, 0.13, 0.018, b.ground("f6f1e2", 0.3))


def _buildings(b: Backdrop, n: int, heights: Point, colour: RGB, *, windows: bool) -> None:
    horizon, shift = HORIZON["city"], b.rng.uniform(-0.5, 0.5) / n
    for i in range(-1, n + 1):
        x, height = (i + 0.06) / n + shift, b.rng.uniform(*heights)
        b.pen.rect(x, horizon - height, 0.88 / n, height + 0.01, colour)
        if windows:
            _windows(b, x, horizon - height, 0.88 / n, height)


def _windows(b: Backdrop, x: float, top: float, width: float, height: float) -> None:
    pen, pane = (b.light, rgb("ffd566")) if b.night else (b.pen, rgb("dcebf6"))
    for row in range(int((height - 0.03) / 0.085)):
        for column in range(3):
            left = x + width * (0.14 + 0.28 * column)
            pen.rect(left, top + 0.03 + 0.085 * row, 0.16 * width, 0.045, pane)


DRAW: dict[str, Callable[[Backdrop], None]] = {
    "sea": sea,
    "beach": beach,
    "meadow": meadow,
    "mountains": mountains,
    "forest": forest,
    "desert": desert,
    "city": city,
}
