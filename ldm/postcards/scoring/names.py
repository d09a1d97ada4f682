"""What an instrument tells apart, of postcards alone or of sprites beside them, and what a scene is called.

A thing of the sprites that postcards show too (a car) is the same kind in another style. A plain background
is a place for each of its colours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm import postcards as world
from ldm.postcards.sprites import scene as sprites
from ldm.postcards.sprites.colour import BACKDROPS
from ldm.postcards.sprites.labels import POSTCARD, AnyScene

AnyGroup = world.Group | sprites.Group
PLAIN = "{} background"


@dataclass(frozen=True)
class Names:
    """The kinds, colours, places, times, weathers and styles that an instrument tells apart."""

    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    weathers: tuple[str, ...]
    styles: tuple[str, ...] = field(default=(POSTCARD,), kw_only=True)


def postcard_names() -> Names:
    """Of the postcards alone."""
    return Names(world.KINDS, world.COLOURS, world.PLACES, world.TIMES, world.WEATHERS)


def sprite_names(seen: sprites.World) -> Names:
    """Of a world of sprites, and of the postcards."""
    kinds = tuple(dict.fromkeys((*world.KINDS, *(thing.noun for thing in seen.things))))
    places = (*world.PLACES, sprites.TABLE, *(PLAIN.format(colour) for colour in BACKDROPS))
    styles = (*seen.styles, POSTCARD)
    return Names(kinds, world.COLOURS, places, world.TIMES, world.WEATHERS, styles=styles)


def kind_of(group: AnyGroup) -> str:
    """What its things are."""
    return group.thing.noun if isinstance(group, sprites.Group) else group.kind


def style_of(scene: AnyScene) -> str:
    """How its things are drawn."""
    return scene.style if isinstance(scene, sprites.Scene) else POSTCARD


def place_of(scene: AnyScene) -> str:
    """Where its things are."""
    if isinstance(scene, sprites.Scene) and scene.place == sprites.PLAIN:
        return PLAIN.format(scene.backdrop)
    return scene.place


def is_outdoors(scene: AnyScene) -> bool:
    """Whether there are an hour and a weather."""
    return not isinstance(scene, sprites.Scene) or scene.outdoors
