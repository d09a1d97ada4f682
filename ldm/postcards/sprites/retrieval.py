"""Which thing was drawn? The sprite whose thumbnail is nearest, for each thing on a plain background.

No classifier is needed, so this can be asked of a model at any time of its training: is the thing right among
all that there are, is it in the style that was asked for.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.postcards.sprites import layout
from ldm.postcards.sprites.atlas import Thing
from ldm.postcards.sprites.captions import full_caption
from ldm.postcards.sprites.picture import render
from ldm.postcards.sprites.scene import PLAIN, Group, Scene, World, unseen_style

_SIDE = 24  # pixels of a thumbnail
_APART = 60  # sum of absolute differences of a pixel from the background's, to be part of the thing
_BACKDROP = {True: "blue", False: "white"}  # by whether the sprite is pale
Draw = Callable[[Sequence[str]], Sequence[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Verdict:
    """One prompt: the thing and style asked for, and how the nearest sprites rank."""

    thing: Thing
    style: str
    prompt: str
    nearest: tuple[str, ...]  # nouns, without repeats
    nearest_style: str

    @property
    def right(self) -> bool:
        return self.nearest[0] == self.thing.noun

    @property
    def right_in_style(self) -> bool:
        return self.right and self.nearest_style == self.style

    @property
    def in_five(self) -> bool:
        return self.thing.noun in self.nearest


def alone(thing: Thing, style: str, rng: random.Random) -> Scene:
    """The thing by itself on a plain background that it stands out from."""
    sprite = thing.sprites[style]
    box = layout.alone(layout.Spot(sprite.aspect, thing.realm, thing.big), PLAIN, "", rng)
    back = _BACKDROP[min(sprite.mean) > 150]
    return Scene(style, PLAIN, "day", "clear", (Group(thing, None, (box,), False),), 0, backdrop=back)


def retrieve(
    world: World, draw: Draw, limit: int | None = None, seed: int = 0, batch: int = 16
) -> list[Verdict]:
    """Verdicts on what `draw` makes of prompts: of `limit` things in a style at random, of all if None."""
    rng = random.Random(seed)
    pairs = [
        (thing, style) for thing in world.things for style in world.styles if unseen_style(thing) != style
    ]
    rng.shuffle(pairs)
    names, gallery = _gallery(world)
    verdicts = []
    chosen = pairs[:limit]
    for start in range(0, len(chosen), batch):
        scenes = [alone(thing, style, rng) for thing, style in chosen[start : start + batch]]
        prompts = [full_caption(scene) for scene in scenes]
        for scene, prompt, drawn in zip(scenes, prompts, draw(prompts), strict=True):
            order = np.argsort(((gallery - thumbnail(drawn).ravel()) ** 2).sum(1))
            nouns = tuple(dict.fromkeys(names[i][0] for i in order))[:5]
            verdicts.append(
                Verdict(scene.groups[0].thing, scene.style, prompt, nouns, names[int(order[0])][1])
            )
    return verdicts


def thumbnail(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What is not background in a picture [H, W, 3], on grey: [24, 24, 3]; all grey if nothing is."""
    pixels = picture.astype(np.int16)
    edge = np.concatenate([pixels[[0, 1, -2, -1]].reshape(-1, 3), pixels[:, [0, 1, -2, -1]].reshape(-1, 3)])
    away = np.abs(pixels - np.median(edge, 0)).sum(-1) > _APART
    out = Image.new("RGB", (_SIDE, _SIDE), (128, 128, 128))
    if away.sum() >= 60:
        rows, columns = np.where(away.any(1))[0], np.where(away.any(0))[0]
        region = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        cut = picture[region].copy()
        cut[~away[region]] = 128
        thing = Image.fromarray(cut)
        scale = _SIDE / max(thing.size)
        size = (max(1, round(thing.width * scale)), max(1, round(thing.height * scale)))
        small = thing.resize(size, Image.Resampling.BOX)
        out.paste(small, ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return np.asarray(out, np.float32)


def _gallery(world: World) -> tuple[list[tuple[str, str]], NDArray[np.float32]]:
    """Each thing in each style, as it is and mirrored: noun and style, and thumbnails [N, 24 * 24 * 3]."""
    names, thumbnails = [], []
    rng = random.Random(5)
    for thing in world.things:
        for style in world.styles:
            seen = thumbnail(render(alone(thing, style, rng), 128))
            for each in (seen, seen[:, ::-1]):
                names.append((thing.noun, style))
                thumbnails.append(each.ravel())
    return names, np.stack(thumbnails)


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares of all verdicts."""
    n = len(verdicts)
    return {
        "right": sum(each.right for each in verdicts) / n,
        "in five": sum(each.in_five for each in verdicts) / n,
        "right in style": sum(each.right_in_style for each in verdicts) / n,
        "n": float(n),
    }


def by_thing(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Of each thing how often it was right, and what else was seen."""
    found: dict[str, list[Verdict]] = defaultdict(list)
    for each in verdicts:
        found[each.thing.noun].append(each)
    return {
        noun: {
            "right": sum(each.right for each in its) / len(its),
            "seen as": sorted({each.nearest[0] for each in its} - {noun}),
        }
        for noun, its in found.items()
    }
