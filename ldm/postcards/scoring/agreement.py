"""How well the scorer reads pictures whose content is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ldm import postcards as world
from ldm.evaluate.report import Rate, rate
from ldm.postcards.scoring.scorer import MAX_COUNT, Reading, ScorerConfig


def names() -> ScorerConfig:
    """A scorer's configuration for the postcard world."""
    return ScorerConfig(world.KINDS, world.COLOURS, world.PLACES, world.TIMES, world.WEATHERS)


def truth(scenes: Sequence[world.Scene]) -> Reading:
    """What a scorer without fault would read from renders of these scenes."""
    labels = [world.encode_labels(scene) for scene in scenes]
    count = np.stack([label.count for label in labels]).astype(np.int64)
    return Reading(
        presence=(count > 0).astype(np.float32),
        count=count,
        colour=np.stack([label.colour for label in labels]).astype(np.int64),
        x=np.stack([label.x for label in labels]).astype(np.float32),
        y=np.stack([label.y for label in labels]).astype(np.float32),
        place=np.array([label.place for label in labels]),
        time=np.array([label.time for label in labels]),
        weather=np.array([label.weather for label in labels]),
        features=np.zeros((len(labels), 0), np.float32),
    )


def agreement(read: Reading, true: Reading) -> dict[str, Rate]:
    """Presence recall and precision, colour, counts, order in space, place, time and weather.

    Colour and count are asked of the kinds that are there; order of each pair of kinds that are there once
    and lie at least 0.15 apart.
    """
    there, seen = true.count > 0, read.count > 0
    rates = {
        "presence recall": rate(seen[there].tolist()),
        "presence precision": rate(there[seen].tolist()),
        "colour": rate((read.colour == true.colour)[there].tolist()),
        "order": rate(_orders(read, true)),
    }
    for n in range(1, MAX_COUNT + 1):
        rates[f"count {n}"] = rate((read.count == n)[true.count == n].tolist())
    for name in ("place", "time", "weather"):
        rates[name] = rate((getattr(read, name) == getattr(true, name)).tolist())
    return rates


def _orders(read: Reading, true: Reading, apart: float = 0.15) -> Iterator[bool]:
    for i, count in enumerate(true.count):
        once = np.flatnonzero(count == 1)
        for a, b in ((a, b) for k, a in enumerate(once) for b in once[k + 1 :]):
            for said, found in ((true.x, read.x), (true.y, read.y)):
                if abs(said[i, a] - said[i, b]) >= apart:
                    yield bool((said[i, a] < said[i, b]) == (found[i, a] < found[i, b]))
