"""From a scene of sprites to pixels: a postcard's background, a table or one colour; shadows; the sprites."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import skia
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ldm.postcards import places
from ldm.postcards.canvas import RGB, Pen, Sheet, rgb
from ldm.postcards.layout import Box
from ldm.postcards.picture import THING_LIGHT, land_tint
from ldm.postcards.sky import draw_falling, draw_sky
from ldm.postcards.sprites.atlas import Sprite, Thing, pixels
from ldm.postcards.sprites.colour import backdrop
from ldm.postcards.sprites.layout import TABLE_TOP
from ldm.postcards.sprites.scene import PLAIN, TABLE, Group, Scene

_WOOD, _WOOD_EDGE, _WOOD_GRAIN = rgb("c89a68"), rgb("9a6b42"), rgb("bb8b5a")
_WALLS = ("f3ead9", "dfe9ee", "e6e0ee", "e2ecdd", "f2dfd8")
_PALE = 185  # a sprite whose mean channels are all above this is lost on snow
_HALO = 10  # pixels around a sprite in which its halo fades
_HALO_COLOUR = (70, 84, 120)
# What is not itself in a mirror.
_ONE_WAY = (
    "stop sign",
    "calendar",
    "keyboard",
    "laptop",
    "computer",
    "taxi",
    "police car",
    "ambulance",
    "shop",
)


def render(seen: Scene, size: int = 256) -> NDArray[np.uint8]:
    """Draw the scene: [size, size, 3], red green blue. The same scene always gives the same pixels."""
    sheet = Sheet(size)
    rng = random.Random(seen.seed)
    if seen.outdoors:
        _landscape(sheet.pen, seen, rng)
    elif seen.place == TABLE:
        _table(sheet.pen, rng)
    else:
        sheet.pen.rect(0, 0, 1, 1, backdrop(seen.backdrop))
    for group in seen.groups:
        for box in group.boxes:
            _shadow(sheet.pen, seen, group, box)
            _sprite(sheet.pen, seen, group, box)
    return sheet.pixels()


def object_cells(seen: Scene, cells: int) -> NDArray[np.uint8]:
    """How much of each cell things cover, 0 to 255: [cells, cells]."""
    sheet = Sheet(8 * cells)
    for group in seen.groups:
        for box in group.boxes:
            _draw(sheet.pen, _outline(group.thing, seen.style), box, group)
    fine = sheet.pixels()[..., 0].reshape(cells, 8, cells, 8)
    covered: NDArray[np.uint8] = fine.mean((1, 3)).astype(np.uint8)
    return covered


def _landscape(pen: Pen, seen: Scene, rng: random.Random) -> None:
    postcard = seen.postcard()
    draw_sky(pen, postcard, rng)
    land, snowy = pen.with_tint(land_tint(postcard)), seen.weather == "snow"
    places.DRAW[seen.place](places.Backdrop(land, pen, rng, snowy, seen.time == "night"))
    draw_falling(pen, postcard, rng)


def _table(pen: Pen, rng: random.Random) -> None:
    pen.rect(0, 0, 1, 1, rgb(rng.choice(_WALLS)))
    pen.rect(0, TABLE_TOP, 1, 0.36, _WOOD)
    for k in range(3):
        y = TABLE_TOP + 0.06 + 0.1 * k + rng.uniform(-0.01, 0.01)
        pen.rect(rng.uniform(0, 0.5), y, rng.uniform(0.25, 0.5), 0.012, _WOOD_GRAIN, 0.006)
    pen.rect(0, TABLE_TOP + 0.34, 1, 0.06, _WOOD_EDGE)


def _shadow(pen: Pen, seen: Scene, group: Group, box: Box) -> None:
    """A soft one on the ground, a bright ripple on the water, nothing in the air."""
    realm, half = group.thing.realm, (box.right - box.left) / 2
    if seen.place == PLAIN or realm in ("air", "portrait"):
        return
    if realm == "water" or seen.place == "sea":
        pen.soft_oval(box.x, box.bottom, half, 0.018, rgb("a9dcf2"), 255, 0.004)
    else:
        pen.soft_oval(box.x, box.bottom, 0.88 * half, 0.018, rgb("1e2430"), 95, 0.011)


def _sprite(pen: Pen, seen: Scene, group: Group, box: Box) -> None:
    pale = group.colour == "white" or min(group.thing.sprites[seen.style].mean) > _PALE
    if pale and (seen.weather == "snow" or not seen.outdoors):
        _draw(pen, _halo(group.thing, seen.style), _halo_box(group.thing.sprites[seen.style], box), group)
    _draw(pen, _image(group.thing, seen.style, group.colour), box, group, THING_LIGHT[seen.time])


def _draw(pen: Pen, image: Any, box: Box, group: Group, light: RGB = (1, 1, 1)) -> None:
    mirrored = group.flipped and group.thing.noun not in _ONE_WAY
    pen.image(image, (box.left, box.top), (box.right, box.bottom), mirrored=mirrored, light=light)


@functools.lru_cache(maxsize=4096)
def _image(thing: Thing, style: str, colour: str | None) -> Any:
    return _to_skia(pixels(thing, style, colour))


@functools.lru_cache(maxsize=1024)
def _outline(thing: Thing, style: str) -> Any:
    """The sprite all in white."""
    rgba = pixels(thing, style).copy()
    rgba[..., :3] = 255
    return _to_skia(rgba)


@functools.lru_cache(maxsize=1024)
def _halo(thing: Thing, style: str) -> Any:
    """The sprite's outline, blurred, with _HALO pixels more on each side."""
    alpha = Image.fromarray(pixels(thing, style)[..., 3])
    wide = Image.new("L", (alpha.width + 2 * _HALO, alpha.height + 2 * _HALO))
    wide.paste(alpha, (_HALO, _HALO))
    soft = np.asarray(wide.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(3)))
    rgba = np.empty((*soft.shape, 4), np.uint8)
    rgba[..., :3] = _HALO_COLOUR
    rgba[..., 3] = 0.6 * soft
    return _to_skia(rgba)


def _halo_box(sprite: Sprite, box: Box) -> Box:
    more = _HALO * box.height / sprite.height
    return Box(box.left - more, box.top - more, box.right + more, box.bottom + more)


def _to_skia(rgba: NDArray[np.uint8]) -> Any:
    """Premultiplied, as skia draws it."""
    premultiplied = rgba.copy()
    premultiplied[..., :3] = rgba[..., :3].astype(np.uint16) * rgba[..., 3:] // 255
    kind = {"colorType": skia.kRGBA_8888_ColorType, "alphaType": skia.kPremul_AlphaType}
    return skia.Image.fromarray(premultiplied, copy=True, **kind)
