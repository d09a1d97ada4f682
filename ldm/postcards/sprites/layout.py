"""Where sprites stand: boxes that do not touch, in unit coordinates; heads may leave the picture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.postcards.layout import GAP, MARGIN, Box

TABLE_TOP = 0.60  # where the wall ends and the table begins


@dataclass(frozen=True)
class Spot:
    """What the layout must know of a thing: width in units of its height, realm, and whether it is large."""

    aspect: float
    realm: str
    big: bool

    def room(self, side: float, width: float = 1.0) -> tuple[float, float]:
        """Width and height where the longer side is `side`, less where it would be wider than `width`."""
        height = side / max(1.0, self.aspect)
        height = min(height, width / self.aspect)
        return self.aspect * height, height


def alone(spot: Spot, place: str, size: str, rng: random.Random) -> Box:
    """One thing anywhere from left to right; `size` is "", "small" or "big"."""
    width, height = spot.room(_side(spot, place, size, rng))
    x = rng.uniform(MARGIN + width / 2, 1 - MARGIN - width / 2)
    return _box(x, _bottom(spot, place, height, rng), width, height)


def _side(spot: Spot, place: str, size: str, rng: random.Random) -> float:
    if size == "big":
        return rng.uniform(0.76, 0.88)
    if size == "small":
        return rng.uniform(0.24, 0.32)
    if place in ("plain", "table") or spot.realm == "portrait":
        return rng.uniform(0.56, 0.72)
    if place == "beach" and spot.realm == "water":
        return rng.uniform(0.42, 0.50)
    return rng.uniform(0.56, 0.70) if spot.big else rng.uniform(0.46, 0.60)


def row(spots: Sequence[Spot], place: str, rng: random.Random) -> tuple[Box, ...]:
    """Two or three things side by side, from left to right, with random gaps."""
    n = len(spots)
    room = 1 - 2 * MARGIN - (n - 1) * GAP
    side = rng.uniform(0.40, 0.48)
    rooms = [spot.room(side, room / n) for spot in spots]
    free = room - sum(width for width, _ in rooms)
    cuts = sorted(rng.uniform(0, free) for _ in range(n))
    # Equal things stand on one line.
    lines = {spot: _bottom(spot, place, height, rng) for spot, (_, height) in zip(spots, rooms, strict=True)}
    boxes = []
    left = MARGIN
    for i, (spot, (width, height)) in enumerate(zip(spots, rooms, strict=True)):
        boxes.append(_box(left + cuts[i] + width / 2, lines[spot], width, height))
        left += width + GAP
    return tuple(boxes)


def stacked(spots: Sequence[Spot], place: str, rng: random.Random) -> tuple[Box, ...]:
    """The first thing in the air above the second."""
    upper, lower = spots
    ceiling, floor = rng.uniform(MARGIN, 0.05), rng.uniform(0.90, 0.95)
    if place == "plain":
        ceiling, floor = ceiling + 0.02, floor - 0.02
    width, height = lower.room(rng.uniform(0.38, 0.44))
    x = rng.uniform(MARGIN + width / 2, 1 - MARGIN - width / 2)
    below = _box(x, floor, width, height)
    width, height = upper.room(min(rng.uniform(0.36, 0.44), below.top - GAP - ceiling))
    over = min(max(x + rng.uniform(-0.08, 0.08), MARGIN + width / 2), 1 - MARGIN - width / 2)
    return _box(over, ceiling + height, width, height), below


def _bottom(spot: Spot, place: str, height: float, rng: random.Random) -> float:
    """The line a thing stands, floats or hangs on."""
    if place == "plain":
        return 0.5 + height / 2 + rng.uniform(-0.04, 0.04)
    if spot.realm == "portrait":
        return rng.uniform(1.0, 1.04)
    if spot.realm == "air":
        return min(height + rng.uniform(MARGIN + 0.01, 0.14), 1 - MARGIN)
    if place == "table":
        return max(rng.uniform(0.80, 0.90), height + MARGIN)
    if place == "sea":
        return max(rng.uniform(0.78, 0.86), height + MARGIN)
    if spot.realm == "water":
        return max(rng.uniform(0.62, 0.66), height + MARGIN)
    return max(rng.uniform(0.87, 0.94), height + MARGIN)


def _box(x: float, bottom: float, width: float, height: float) -> Box:
    return Box(x - width / 2, bottom - height, x + width / 2, bottom)
