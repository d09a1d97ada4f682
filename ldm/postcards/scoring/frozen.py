"""The prompts that models of the sprites' world are scored on: chosen once, and kept in a file.

1,500 of what is seen in training and 700 with a combination that is not: of a thing and a colour, a place or
a style. The world may change (a thing is taken out, a caption gets another form) and they stay what they are,
so they lie in `assets/sprites/prompts.jsonl`, each with its scene and what its text states. Many are of the
first 100 and 200 things alone, so that they serve for a smaller world too: `read_prompts(things=100)`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ldm import postcards
from ldm.errors import UserError
from ldm.files import whole_file
from ldm.postcards.layout import Box
from ldm.postcards.scoring.names import kind_of, place_of, style_of
from ldm.postcards.scoring.prompts import Named, Prompt, full_caption, state, tell
from ldm.postcards.sprites.atlas import FOLDER, Thing, load_things
from ldm.postcards.sprites.labels import POSTCARD, AnyScene
from ldm.postcards.sprites.scene import (
    PLAIN,
    Group,
    Scene,
    Unseen,
    World,
    make_world,
    sample_scene,
    unseen_place,
    unseen_style,
)

FILE = FOLDER / "prompts.jsonl"
SEEN, HELD_OUT = 1500, 700
_BLOCKS = ((100, 0.25), (200, 0.25), (400, 0.5))  # of two things: among how many, and which share of them
_SEEN_TOGETHER: Mapping[str, int] = {"beside": 200, "stacked": 120}
_COUNTS: Mapping[str, int] = {"two": 100, "three": 90}
_POSTCARDS = 190
_UNSEEN: Mapping[Unseen, int] = {"colour": 240, "place": 260, "style": 110}
_UNSEEN_TOGETHER = 0.25
_UNSEEN_POSTCARDS = 90


@dataclass(frozen=True)
class Frozen:
    """A prompt, and which combination in it training never shows, if any."""

    prompt: Prompt
    unseen: Unseen | None


def choose_prompts(things: int = 400, seed: int = 6) -> list[Frozen]:
    """All of them, in an order of which every beginning has about the mix of the whole.

    The same for the same things and seed. Raises ValueError unless there are 400 things or more.
    """
    rng, world = random.Random(seed), make_world(things)
    if len(world.things) < _BLOCKS[-1][0]:
        raise ValueError(f"{len(world.things)} things are fewer than the {_BLOCKS[-1][0]} of the prompts")
    seen: list[AnyScene] = [*_singles(world, rng), *_several(world, rng), *_together(world, rng)]
    seen += [_postcard(rng, held_out=False) for _ in range(_POSTCARDS)]
    unseen: list[tuple[AnyScene, Unseen | None]] = [*_unseen(world, rng)]
    unseen += [(_postcard(rng, held_out=True), "colour") for _ in range(_UNSEEN_POSTCARDS)]
    return [*_told([(scene, None) for scene in seen], rng), *_told(unseen, rng)]


def _postcard(rng: random.Random, *, held_out: bool) -> postcards.Scene:
    """With something in it: what has nothing is in the postcards' own prompts."""
    while True:
        scene = postcards.sample_scene(rng, held_out=held_out)
        if scene.groups:
            return scene


def _told(scenes: Sequence[tuple[AnyScene, Unseen | None]], rng: random.Random) -> list[Frozen]:
    """About half in full captions, the others in captions of many forms; shuffled."""
    found = []
    for scene, unseen in scenes:
        written = rounded(scene)
        plain = rng.random() < 0.5
        found.append(Frozen(state(full_caption(written), written) if plain else tell(written, rng), unseen))
    rng.shuffle(found)
    return found


def rounded(scene: AnyScene) -> AnyScene:
    """The scene with boxes as they are written."""
    if isinstance(scene, Scene):
        return replace(scene, groups=tuple(replace(g, boxes=_rounded(g.boxes)) for g in scene.groups))
    return replace(scene, groups=tuple(replace(g, boxes=_rounded(g.boxes)) for g in scene.groups))


def _rounded(boxes: Sequence[Box]) -> tuple[Box, ...]:
    return tuple(Box(*(round(side, 3) for side in astuple(box))) for box in boxes)


# --- seen --------------------------------------------------------------------------------------------------


def _singles(world: World, rng: random.Random) -> Iterator[Scene]:
    """Each thing in each of the styles (where training lacks one, twice in the other): once plain, once not.

    Of what has a place beside a plain background; what can be painted is so once.
    """
    for thing in world.things:
        styles = [style for style in world.styles if style != unseen_style(thing)]
        first = rng.randrange(2)
        for k, style in enumerate(islice(cycle(styles), 2)):
            plain, painted = (k + first) % 2 == 0, k == thing.number % 2
            paintable = thing.sprites[style].paintable

            def fits(scene: Scene, plain: bool = plain, painted: bool = painted and paintable) -> bool:
                one = scene.groups[0]
                placed = (scene.place == PLAIN) == plain or one.thing.realm == "icon"
                return placed and bool(one.colour) == painted

            yield _sampled(World((thing,), (style,)), rng, "one", fits)


def _several(world: World, rng: random.Random) -> Iterator[Scene]:
    """Two and three of a kind, of other things each time."""
    things = rng.sample([thing for thing in world.things if thing.plural], sum(_COUNTS.values()))
    compositions = [name for name, count in _COUNTS.items() for _ in range(count)]
    for thing, composition in zip(things, compositions, strict=True):
        styles = [style for style in world.styles if style != unseen_style(thing)]
        yield _sampled(World((thing,), styles), rng, composition)


def _together(world: World, rng: random.Random) -> Iterator[Scene]:
    """Two things beside or above each other, half of them both painted."""
    for composition, count in _SEEN_TOGETHER.items():
        for block, share in _BLOCKS:
            part = World(world.things[:block], world.styles)
            for k in range(round(share * count)):
                yield _sampled(part, rng, composition, _painted if k % 2 == 0 else _any)


def _painted(scene: Scene) -> bool:
    return all(group.colour for group in scene.groups)


def _any(_: Scene) -> bool:
    return True


def _sampled(
    world: World, rng: random.Random, composition: str, fits: Callable[[Scene], bool] = _any
) -> Scene:
    while True:
        scene = sample_scene(world, rng, compositions={composition: 1})
        if fits(scene):
            return scene


# --- held out ----------------------------------------------------------------------------------------------


def _unseen(world: World, rng: random.Random) -> Iterator[tuple[Scene, Unseen]]:
    """Things in turn in what training never shows them in; a quarter of them beside another."""
    for unseen, count in _UNSEEN.items():
        able = [thing for thing in world.things if _can(thing, unseen, world.styles)]
        rng.shuffle(able)
        together = {block: round(share * _UNSEEN_TOGETHER * count) for block, share in _BLOCKS}
        for thing in islice(cycle(able), count - sum(together.values())):
            one = World((thing,), [style for style in world.styles if _can(thing, unseen, (style,))])
            yield sample_scene(one, rng, unseen=unseen, compositions={"one": 1}), unseen
        for block, pairs in together.items():
            part = World(world.things[:block], world.styles)
            for _ in range(pairs):
                yield sample_scene(part, rng, unseen=unseen, compositions={"beside": 1}), unseen


def _can(thing: Thing, unseen: Unseen, styles: Sequence[str]) -> bool:
    """Whether training lacks such a combination of the thing, in one of the styles."""
    if unseen == "style":
        return unseen_style(thing) in styles
    usual = [style for style in styles if style != unseen_style(thing)]
    if unseen == "place":
        return unseen_place(thing) is not None and bool(usual)
    return any(thing.sprites[style].paintable for style in usual)


# --- the file ----------------------------------------------------------------------------------------------


def write_prompts(prompts: Sequence[Frozen], path: Path = FILE) -> None:
    """One JSON object a line: text, scene, what the text states of it, and what training never shows."""
    with whole_file(path) as aside:
        lines = (json.dumps(_row(each), separators=(",", ":"), ensure_ascii=False) for each in prompts)
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_prompts(things: int | None = None, path: Path = FILE) -> list[Frozen]:
    """Those that name only postcards and the first `things` things of the atlas; all if None.

    Raises UserError where the file or the atlas is not there, or names a thing that the atlas lacks.
    """
    known = {thing.code: thing for thing in load_things()}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"no prompts in {path}: they are in the repository; work in a clone of it") from error
    try:
        found = [_frozen(row, known) for row in rows]
    except KeyError as error:
        raise UserError(f"{path} names {error}, which is not in the atlas: choose prompts again") from error
    return [each for each in found if things is None or _within(each.prompt.scene, things)]


def _within(scene: AnyScene, things: int) -> bool:
    return not isinstance(scene, Scene) or all(group.thing.number < things for group in scene.groups)


_FACTS = ("style", "place", "time", "weather", "relation")


def _row(frozen: Frozen) -> dict[str, Any]:
    """What differs from the defaults of `_frozen`."""
    prompt, scene = frozen.prompt, frozen.prompt.scene
    row: dict[str, Any] = {"text": prompt.text, "states": [f for f in _FACTS if getattr(prompt, f)]}
    row |= {"unseen": frozen.unseen, "style": style_of(scene), "place": scene.place}
    row |= {"time": scene.time, "weather": scene.weather, "relation": scene.relation, "seed": scene.seed}
    if isinstance(scene, Scene):
        row |= {"size": scene.size, "backdrop": scene.backdrop}
    row["groups"] = [_group_row(group) for group in scene.groups]
    return {name: value for name, value in row.items() if value}


def _group_row(group: Group | postcards.Group) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if isinstance(group, Group):
        row |= {"thing": group.thing.code, "flipped": group.flipped}
    else:
        row |= {"kind": group.kind}
    row |= {"colour": group.colour, "boxes": [astuple(box) for box in group.boxes]}
    return {name: value for name, value in row.items() if value}


def _frozen(row: Mapping[str, Any], known: Mapping[str, Thing]) -> Frozen:
    scene = _scene(row, known)
    objects = tuple(Named(kind_of(group), group.colour, group.count) for group in scene.groups)
    said = {fact: row[fact] if fact in row.get("states", ()) else None for fact in _FACTS}
    if said["place"]:
        said["place"] = place_of(scene)
    return Frozen(Prompt(row["text"], scene, objects, **said), row.get("unseen"))


def _scene(row: Mapping[str, Any], known: Mapping[str, Thing]) -> AnyScene:
    facts = {name: row[name] for name in ("place", "time", "weather", "seed")}
    facts["relation"] = row.get("relation")
    groups = [(each, tuple(Box(*box) for box in each["boxes"])) for each in row["groups"]]
    if row["style"] == POSTCARD:
        plain = tuple(postcards.Group(each["kind"], each["colour"], boxes) for each, boxes in groups)
        return postcards.Scene(groups=plain, **facts)
    things = tuple(
        Group(known[each["thing"]], each.get("colour"), boxes, each.get("flipped", False))
        for each, boxes in groups
    )
    more = {"style": row["style"], "size": row.get("size", ""), "backdrop": row["backdrop"]}
    return Scene(groups=things, **facts, **more)
