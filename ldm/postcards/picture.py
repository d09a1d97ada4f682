"""From a scene to pixels: sky, place, what falls from the sky, then the things."""

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm.postcards import places, things
from ldm.postcards.canvas import RGB, WHITE, Pen, Sheet, Tint, mix, multiply, rgb
from ldm.postcards.scene import Group, Scene
from ldm.postcards.sky import draw_falling, draw_sky
from ldm.postcards.vocabulary import SHAPES

# Each hour multiplies the colours of the land, and of things, whose colour must stay tellable, more mildly.
_LAND: dict[str, RGB] = {
    "dawn": (0.98, 0.94, 0.98),
    "day": (1, 1, 1),
    "sunset": (1, 0.76, 0.66),
    "night": (0.50, 0.58, 0.84),
}
# Snow takes the colour of the sky: lit by these instead, it is never mistaken for sand.
_SNOWY_LAND: dict[str, RGB] = {
    "dawn": (0.98, 0.96, 1),
    "day": (1, 1, 1),
    "sunset": (0.97, 0.84, 0.88),
    "night": (0.60, 0.67, 0.90),
}
THING_LIGHT: dict[str, RGB] = {
    "dawn": (1, 0.98, 0.99),
    "day": (1, 1, 1),
    "sunset": (1, 0.93, 0.89),
    "night": (0.91, 0.92, 1),
}
_MIST = rgb("e6dcf2")  # pales the land at dawn


def render(scene: Scene, size: int = 128, paints: Sequence[RGB] | None = None) -> npt.NDArray[np.uint8]:
    """Draw the scene: [size, size, 3], red green blue. The same scene always gives the same pixels.

    `paints`, one for each group, [0, 255] each, take the place of their colours' own. Raises ValueError for
    another number of them.
    """
    if paints is None:
        paints = [things.PAINT[group.colour] for group in scene.groups]
    if len(paints) != len(scene.groups):
        raise ValueError(f"{len(paints)} paints are not one for each of {len(scene.groups)} groups")
    rng, sheet = random.Random(scene.seed), Sheet(size)
    land = sheet.pen.with_tint(land_tint(scene))
    draw_sky(sheet.pen, scene, rng)
    snowy, night = scene.weather == "snow", scene.time == "night"
    places.DRAW[scene.place](places.Backdrop(land, sheet.pen, rng, snowy, night))
    draw_falling(sheet.pen, scene, rng)
    for group, paint in zip(scene.groups, paints, strict=True):
        _shadows(land, group, scene.place)
        _draw_group(sheet.pen.with_tint(multiply(THING_LIGHT[scene.time])), group, paint)
    return sheet.pixels()


def object_mask(scene: Scene, size: int = 128) -> npt.NDArray[np.bool_]:
    """Where any thing covers the picture: [size, size]."""
    sheet = Sheet(size)
    for group in scene.groups:
        _draw_group(sheet.pen.with_tint(lambda _: WHITE), group, WHITE)
    return sheet.pixels()[..., 0] > 127


def land_tint(scene: Scene) -> Tint:
    """How the hour and the weather colour what does not shine."""
    light = (_SNOWY_LAND if scene.weather == "snow" else _LAND)[scene.time]
    dim = 0.84 if scene.weather == "rain" else 1.0
    tint = multiply((light[0] * dim, light[1] * dim, light[2] * dim))
    if scene.time != "dawn" or scene.weather == "snow":
        return tint
    return lambda colour: mix(tint(colour), _MIST, 0.3)


def _draw_group(pen: Pen, group: Group, paint: RGB) -> None:
    for box in group.boxes:
        with pen.at(box.x, box.bottom, box.height):
            things.DRAW[group.kind](pen, paint)


def _shadows(pen: Pen, group: Group, place: str) -> None:
    """A shadow on the ground, a bright ripple on the water, nothing in the air."""
    realm = SHAPES[group.kind].realm
    for box in group.boxes:
        half = (box.right - box.left) / 2
        if realm == "water" or (place == "sea" and realm == "ground"):
            pen.oval(box.x, box.bottom, 1.0 * half, 0.02, rgb("a9dcf2"))
        elif realm == "ground":
            pen.oval(box.x, box.bottom, 0.95 * half, 0.018, rgb("28323c"), 80)
