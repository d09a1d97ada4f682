"""Where things stand: boxes in unit coordinates (0 to 1, y down) that neither touch nor leave the picture."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.postcards.vocabulary import SHAPES

MARGIN = 0.03
GAP = 0.03


@dataclass(frozen=True)
class Box:
    """The room of one thing; it stands on the middle of the lower edge."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def x(self) -> float:
        """Centre, from the left."""
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        """Centre, from the top."""
        return (self.top + self.bottom) / 2

    @property
    def height(self) -> float:
        return self.bottom - self.top


def _box(kind: str, x: float, bottom: float, height: float) -> Box:
    half = SHAPES[kind].half_width * height
    return Box(x - half, bottom - height, x + half, bottom)


def _bottom(kind: str, place: str, height: float, rng: random.Random) -> float:
    """The line a thing stands, floats or hangs on."""
    realm = SHAPES[kind].realm
    if realm == "air":
        return height + rng.uniform(MARGIN + 0.01, 0.13)
    if place == "sea":
        return rng.uniform(0.78, 0.86)
    if realm == "water":
        return rng.uniform(0.61, 0.65)
    return rng.uniform(0.87, 0.94)


def _fit(kind: str, height: float, width: float) -> float:
    """The height, less where the thing would be wider than `width`."""
    return min(height, width / (2 * SHAPES[kind].half_width))


def alone(kind: str, place: str, rng: random.Random) -> Box:
    """One large thing anywhere from left to right."""
    shape = SHAPES[kind]
    height = rng.uniform(shape.shortest, shape.tallest)
    if place == "beach" and shape.realm == "water":
        height = min(height, 0.5)
    half = shape.half_width * height
    x = rng.uniform(MARGIN + half, 1 - MARGIN - half)
    return _box(kind, x, _bottom(kind, place, height, rng), height)


def row(kinds: Sequence[str], place: str, rng: random.Random) -> tuple[Box, ...]:
    """Two or three things side by side, from left to right, with random gaps.

    Things of one kind are equally high; three are about 0.3 wide at most, so that all fit.
    """
    n = len(kinds)
    room = 1 - 2 * MARGIN - (n - 1) * GAP
    tall = rng.uniform(0.34, 0.45) if n == 2 else rng.uniform(0.34, 0.40)
    height = {kind: _fit(kind, tall, room / n) for kind in kinds}
    widths = [2 * SHAPES[kind].half_width * height[kind] for kind in kinds]
    cuts = sorted(rng.uniform(0, room - sum(widths)) for _ in range(n))
    line = {kind: _bottom(kind, place, height[kind], rng) for kind in kinds}
    boxes = []
    for i, kind in enumerate(kinds):
        left = MARGIN + cuts[i] + sum(widths[:i]) + i * GAP
        bottom = line[kind] + rng.uniform(0, 0.015)
        boxes.append(_box(kind, left + widths[i] / 2, bottom, height[kind]))
    return tuple(boxes)


def stacked(upper: str, lower: str, rng: random.Random) -> tuple[Box, Box]:
    """One thing in the air above another that stands or floats low in the picture."""
    below = _fit(lower, rng.uniform(0.36, 0.42), 0.5)
    floor = rng.uniform(0.90, 0.94)
    ceiling = rng.uniform(MARGIN, 0.05)
    above = _fit(upper, floor - below - GAP - ceiling, 0.5) - rng.uniform(0, 0.03)
    above = min(above, 0.45)
    half = max(SHAPES[upper].half_width * above, SHAPES[lower].half_width * below)
    x = rng.uniform(MARGIN + half, 1 - MARGIN - half)
    shift = rng.uniform(-0.08, 0.08)
    side = MARGIN + SHAPES[upper].half_width * above
    over = min(max(x + shift, side), 1 - side)
    return _box(upper, over, ceiling + above, above), _box(lower, x, floor, below)
