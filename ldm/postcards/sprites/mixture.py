"""What the embedded model is trained on: scenes of sprites, and among them the postcards as they are."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ldm import postcards
from ldm.postcards.captions import split
from ldm.postcards.sprites import captions, phrases
from ldm.postcards.sprites.labels import AnyScene
from ldm.postcards.sprites.scene import Group, Scene, World, sample_scene, unseen_colour
from ldm.postcards.vocabulary import COLOURS

_SAID_POSTCARD = 0.15  # of postcards' captions name their style, which goes without saying


@dataclass(frozen=True)
class Mixture:
    """Scenes at random: a share of postcards, the others of sprites."""

    world: World
    postcards: float
    compositions: Mapping[str, float] | None = None

    def sample(self, rng: random.Random) -> AnyScene:
        if rng.random() < self.postcards:
            return postcards.sample_scene(rng)
        return sample_scene(self.world, rng, compositions=self.compositions)


def render(scene: AnyScene, size: int) -> NDArray[np.uint8]:
    """The picture: [size, size, 3], red green blue."""
    from ldm.postcards.sprites import picture

    return picture.render(scene, size) if isinstance(scene, Scene) else postcards.render(scene, size)


def object_cells(scene: AnyScene, cells: int) -> NDArray[np.uint8]:
    """How much of each cell things cover, 0 to 255: [cells, cells]."""
    from ldm.postcards.sprites import picture

    if isinstance(scene, Scene):
        return picture.object_cells(scene, cells)
    mask = postcards.object_mask(scene, 8 * cells).reshape(cells, 8, cells, 8)
    covered: NDArray[np.uint8] = (255 * mask.mean((1, 3))).astype(np.uint8)
    return covered


def caption(scene: AnyScene, rng: random.Random, reworded: float = 0.0) -> str:
    """One of the ways to tell it, a share of them in other words."""
    if isinstance(scene, Scene):
        text = captions.caption(scene, rng)
        return captions.reword(text, scene, rng) if rng.random() < reworded else text
    text = postcards.caption(scene, rng)
    if rng.random() < _SAID_POSTCARD:
        text = f"{text.rstrip('.')}, {rng.choice(phrases.POSTCARD)}"
    return postcards.reword(text, rng) if rng.random() < reworded else text


def repainted(scene: AnyScene, rng: random.Random) -> Scene | None:
    """The same scene with its painted things in other colours they are seen in; None if it has none."""
    if not isinstance(scene, Scene) or not any(group.colour for group in scene.groups):
        return None
    return replace(scene, groups=tuple(_repainted(group, rng) for group in scene.groups))


def _repainted(group: Group, rng: random.Random) -> Group:
    others = [each for each in COLOURS if each not in (group.colour, unseen_colour(group.thing))]
    return replace(group, colour=rng.choice(others)) if group.colour else group


def names_colours(scene: AnyScene, text: str) -> bool:
    """Whether a caption says what colour each painted thing has, in the usual word."""
    words = set(split(text))  # "coloured" has "red" in it
    return all(group.colour is None or group.colour in words for group in scene.groups)
