"""What a caption may name, as numbers: of sprites and of postcards alike.

A kind is one of the postcards' KINDS or a thing of the atlas; a paint is "as it is" or one of the COLOURS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.postcards import scene as postcards
from ldm.postcards.sprites.atlas import STYLES
from ldm.postcards.sprites.colour import BACKDROPS
from ldm.postcards.sprites.scene import PLACES, PLAIN, SIZES, Group, Scene
from ldm.postcards.vocabulary import COLOURS, KINDS, RELATIONS, TIMES, WEATHERS

POSTCARD = "postcard"
PAINTS = 1 + len(COLOURS)  # "as it is" and the colours
AnyScene = Scene | postcards.Scene

_FACTS: dict[str, Sequence[object]] = {
    "style": (*STYLES, POSTCARD),
    "place": PLACES,
    "backdrop": BACKDROPS,
    "time": TIMES,
    "weather": WEATHERS,
    "count": (2, 3),
    "size": SIZES,
    "position": postcards.POSITIONS,
    "relation": RELATIONS,
}


@dataclass(frozen=True)
class Labels:
    """The numbering for the first `things` things of the atlas.

    First come the kinds, then each kind in each paint, then each kind as the first of two (on the left, or
    above), then all else.
    """

    things: int

    @property
    def kinds(self) -> int:
        return len(KINDS) + self.things

    @property
    def total(self) -> int:
        return self.kinds * (2 + PAINTS) + sum(len(values) for values in _FACTS.values())

    def of(self, scene: AnyScene) -> list[int]:
        """All that is true of the scene, ascending."""
        found = []
        for group in scene.groups:
            kind = kind_number(group)
            found += [kind, self.kinds + kind * PAINTS + paint_number(group)]
        if scene.relation:
            found.append(self.kinds * (1 + PAINTS) + kind_number(scene.groups[0]))
        return sorted([*found, *self._facts(scene)])

    def _facts(self, scene: AnyScene) -> list[int]:
        facts: dict[str, object] = {"place": scene.place, "relation": scene.relation, "style": POSTCARD}
        if isinstance(scene, Scene):
            facts |= {"style": scene.style, "size": scene.size}
        if not isinstance(scene, Scene) or scene.outdoors:
            facts |= {"time": scene.time, "weather": scene.weather}
        elif scene.place == PLAIN:
            facts |= {"backdrop": scene.backdrop}
        if len(scene.groups) == 1:
            facts |= {"count": scene.groups[0].count}
            if scene.groups[0].count == 1:
                facts |= {"position": scene.groups[0].position}
        start, found = self.kinds * (2 + PAINTS), []
        for name, values in _FACTS.items():
            if facts.get(name) in values:
                found.append(start + list(values).index(facts[name]))
            start += len(values)
        return found


def kind_number(group: Group | postcards.Group) -> int:
    """Of the group's kind, from 0: the postcards' first."""
    if isinstance(group, Group):
        return len(KINDS) + group.thing.number
    return KINDS.index(group.kind)


def paint_number(group: Group | postcards.Group) -> int:
    """0 for as it is, else one more than the colour's."""
    return 0 if group.colour is None else 1 + COLOURS.index(group.colour)


def thing_cells(scene: AnyScene, cells: int) -> NDArray[np.int16]:
    """Whose room each cell is in, [cells, cells]: 1 + kind * PAINTS + paint, 0 where nobody's."""
    centres = (np.arange(cells) + 0.5) / cells
    grid = np.zeros((cells, cells), np.int16)
    for group in scene.groups:
        number = 1 + kind_number(group) * PAINTS + paint_number(group)
        for box in group.boxes:
            grid[np.ix_(_within(centres, box.top, box.bottom), _within(centres, box.left, box.right))] = (
                number
            )
    return grid


def _within(centres: NDArray[np.float64], start: float, end: float) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (start <= centres) & (centres <= end)
    return inside
