"""How well the scorer reads pictures whose content is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ldm.evaluate.report import Rate, rate
from ldm.postcards.scoring.names import Names, is_outdoors, kind_of, place_of, postcard_names, style_of
from ldm.postcards.scoring.scorer import MAX_COUNT, Reading, ScorerConfig
from ldm.postcards.sprites.labels import AnyScene


def names() -> ScorerConfig:
    """A scorer's configuration for the postcard world."""
    return ScorerConfig(**vars(postcard_names()))


def truth(scenes: Sequence[AnyScene], known: Names | None = None) -> Reading:
    """What an instrument without fault would read from renders of these scenes; without `known`, a scorer.

    -1 where there is nothing to read: the colour of what is as the artist painted it, the hour on a table.
    """
    known = known or names()
    shape = len(scenes), len(known.kinds)
    count, colour = np.zeros(shape, np.int64), np.full(shape, -1)
    x, y = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for i, scene in enumerate(scenes):
        for group in scene.groups:
            at = i, known.kinds.index(kind_of(group))
            count[at] = group.count
            colour[at] = known.colours.index(group.colour) if group.colour else -1
            x[at] = sum(box.x for box in group.boxes) / group.count
            y[at] = sum(box.y for box in group.boxes) / group.count
    outdoors = [is_outdoors(scene) for scene in scenes]
    return Reading(
        presence=(count > 0).astype(np.float32),
        count=count,
        colour=colour,
        x=x,
        y=y,
        place=np.array([known.places.index(place_of(scene)) for scene in scenes]),
        time=_or_none([known.times.index(scene.time) for scene in scenes], outdoors),
        weather=_or_none([known.weathers.index(scene.weather) for scene in scenes], outdoors),
        style=np.repeat([[known.styles.index(style_of(scene))] for scene in scenes], shape[1], axis=1),
        features=np.zeros((len(scenes), 0), np.float32),
    )


def _or_none(numbers: Sequence[int], known: Sequence[bool]) -> NDArray[np.int64]:
    return np.where(known, numbers, -1)


def agreement(read: Reading, true: Reading) -> dict[str, Rate]:
    """Presence recall and precision, colour, style, counts, order in space, place, time and weather.

    Colour, style and count are asked of the kinds that are there; order of each pair of kinds that are there
    once and lie at least 0.15 apart.
    """
    there, seen = true.count > 0, read.count > 0
    rates = {
        "presence recall": rate(seen[there].tolist()),
        "presence precision": rate(there[seen].tolist()),
        "colour": rate((read.colour == true.colour)[true.colour >= 0].tolist()),
        "style": rate((read.style == true.style)[there].tolist()),
        "order": rate(_orders(read, true)),
    }
    for n in range(1, MAX_COUNT + 1):
        rates[f"count {n}"] = rate((read.count == n)[true.count == n].tolist())
    for name in ("place", "time", "weather"):
        told = getattr(true, name) >= 0
        rates[name] = rate((getattr(read, name) == getattr(true, name))[told].tolist())
    return rates


def _orders(read: Reading, true: Reading, apart: float = 0.15) -> Iterator[bool]:
    for i, count in enumerate(true.count):
        once = np.flatnonzero(count == 1)
        for a, b in ((a, b) for k, a in enumerate(once) for b in once[k + 1 :]):
            for said, found in ((true.x, read.x), (true.y, read.y)):
                if abs(said[i, a] - said[i, b]) >= apart:
                    yield bool((said[i, a] < said[i, b]) == (found[i, a] < found[i, b]))
