"""The fixed prompts that models are scored on, and what each of them states.

Half are `full_caption`s, half are captions in the training's many styles, of scenes sampled from seeds of
their own. So they are in the language that a postcard model is trained on, and a short one may well be, word
for word, a caption that it saw; what is new in the held-out set is the pair of kind and colour. Only what a
text says is asked of its picture: a caption that keeps silent about the weather leaves it free.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldm import postcards as world
from ldm.postcards import phrases
from ldm.postcards.scoring.names import is_outdoors, kind_of, place_of
from ldm.postcards.sprites import captions as sprites
from ldm.postcards.sprites import phrases as sprite_phrases
from ldm.postcards.sprites.labels import AnyScene
from ldm.postcards.sprites.scene import Scene

SEEN, HELD_OUT = 1000, 500
# Of the prompts with each composition; held-out combinations need a thing to combine.
MIX = {"one": 0.60, "side by side": 0.12, "above": 0.10, "two or three": 0.12, "scenery": 0.06}
HELD_OUT_MIX = {"one": 0.75, "side by side": 0.13, "above": 0.12}


@dataclass(frozen=True)
class Named:
    """Things that a prompt names."""

    kind: str
    colour: str | None
    count: int


@dataclass(frozen=True)
class Prompt:
    """A text, what it states (None: left free), and a scene that it is true of."""

    text: str
    scene: AnyScene
    objects: tuple[Named, ...]
    relation: str | None  # of the first object to the second, one of RELATIONS
    place: str | None
    time: str | None
    weather: str | None
    style: str | None = None


def evaluation_prompts(count: int | None = None, *, held_out: bool = False) -> list[Prompt]:
    """The first `count` prompts of 1,000 seen or 500 held-out ones, the same in every process.

    The set is shuffled once, so that its beginning has about the mix of the whole.
    """
    return _prompts("evaluation", held_out)[:count]


def reference_prompts(count: int | None = None, *, held_out: bool = False) -> list[Prompt]:
    """As many others of the same mix: distances between sets want samples that know nothing of each other."""
    return _prompts("reference", held_out)[:count]


def _prompts(name: str, held_out: bool) -> list[Prompt]:
    total, mix = (HELD_OUT, HELD_OUT_MIX) if held_out else (SEEN, MIX)
    rng = random.Random(f"{name} prompts, held out: {held_out}")
    wanted = {kind: round(share * total) for kind, share in mix.items()}
    prompts: list[Prompt] = []
    while any(wanted.values()):
        scene = world.sample_scene(rng, held_out=held_out)
        kind = composition(scene)
        if wanted.get(kind, 0):
            plain = wanted[kind] % 2 == 0
            wanted[kind] -= 1
            prompts.append(state(full_caption(scene), scene) if plain else tell(scene, rng))
    rng.shuffle(prompts)
    return prompts


def composition(scene: AnyScene) -> str:
    """Which of MIX a scene is."""
    if not scene.groups:
        return "scenery"
    if len(scene.groups) == 2:
        return "above" if scene.relation == "above" else "side by side"
    return "one" if scene.groups[0].count == 1 else "two or three"


def digest(prompts: Sequence[Prompt]) -> str:
    """Changes when any text changes, so that figures are compared only where the prompts were the same."""
    return hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()[:16]


def full_caption(scene: AnyScene) -> str:
    """Everything that can be told of a scene, always in the same words."""
    return sprites.full_caption(scene) if isinstance(scene, Scene) else world.full_caption(scene)


def tell(scene: AnyScene, rng: random.Random) -> Prompt:
    """A caption that names things, colours and relation; place, time, weather and style as it happens."""
    while True:
        text = sprites.caption(scene, rng) if isinstance(scene, Scene) else world.caption(scene, rng)
        prompt = state(text, scene)
        colours = [named.colour for named in prompt.objects] == [group.colour for group in scene.groups]
        if colours and prompt.relation == scene.relation:
            return prompt


# --- what a text states ----------------------------------------------------------------------------------


def state(text: str, scene: AnyScene) -> Prompt:
    """The prompt that a true caption of a scene makes: each fact of the scene that the text has a word for.

    What is only implied ("in the moonlight": no clouds) is left free.
    """
    plain = text.lower().replace("green hills", "hills")
    bare = _without(plain, _nouns(scene))
    things = bare != plain
    objects = tuple(
        Named(kind_of(group), group.colour if _says_colour(bare, group.colour) else None, group.count)
        for group in scene.groups
    )
    outdoors = is_outdoors(scene)
    return Prompt(
        text,
        scene,
        objects if things else (),
        scene.relation if things and _says_relation(bare, scene.relation) else None,
        _said(bare, scene.place, _PLACE_WORDS) if outdoors else place_of(scene),
        _said(bare, scene.time, _TIME_WORDS) if outdoors else None,
        _said(bare, scene.weather, _WEATHER_WORDS) if outdoors else None,
        _said(bare, scene.style, _STYLE_WORDS) if isinstance(scene, Scene) else None,
    )


def _nouns(scene: AnyScene) -> list[str]:
    """What the scene's things may be called."""
    if isinstance(scene, Scene):
        return [name.lower() for group in scene.groups for name in sprites.names_of(group)]
    return [noun for names in phrases.NOUNS.values() for pair in names for noun in pair]


def _without(text: str, parts: list[str]) -> str:
    longest_first = "|".join(map(re.escape, sorted(parts, key=len, reverse=True)))
    return re.sub(rf"\b({longest_first})\b", "", text)


def _says_colour(text: str, colour: str | None) -> bool:
    return colour is not None and bool({colour, *phrases.COLOUR_WORDS.get(colour, ())} & set(_words(text)))


def _says_relation(text: str, relation: str | None) -> bool:
    if relation is None:
        return False
    if relation == "left of":
        return any(said in text for said in ("left of", "right of", "on the left and"))
    # "under a cloudy sky" says nothing of two things.
    skies = [
        said for table in (phrases.WEATHERS, phrases.CLEAR_TIMES) for each in table.values() for said in each
    ]
    said = set(_words(_without(text, skies)))
    return bool(said & set(_words(" ".join((*phrases.RELATIONS[relation], *phrases.INVERSE[relation])))))


def _words(text: str) -> list[str]:
    return text.replace(",", " ").replace(".", " ").split()


def _said(text: str, fact: str, telling: Mapping[str, frozenset[str]]) -> str | None:
    return fact if telling[fact] & set(_words(text)) else None


_COMMON = frozenset(
    _words("a an the of at on in out as and with while under over by near among during middle open")
)


def _telling(*tables: Mapping[str, object]) -> dict[str, frozenset[str]]:
    """For each fact of a category, the words that are used for it and for no other of that category."""
    used: dict[str, set[str]] = {}
    for table in tables:
        for fact, value in table.items():
            used.setdefault(fact, set()).update(word for text in _strings(value) for word in _words(text))
    return {
        fact: frozenset(words - _COMMON - set().union(*(w for other, w in used.items() if other != fact)))
        for fact, words in used.items()
    }


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value.replace("{}", "").replace("green hills", "hills")
    elif isinstance(value, tuple):
        for each in value:
            yield from _strings(each)


def _only(table: Mapping[str, object], facts: tuple[str, ...]) -> dict[str, object]:
    return {fact: table[fact] for fact in facts}


_PLACE_WORDS = _telling(
    phrases.PLACES,
    phrases.OVER,
    phrases.SCENERY,
    {"sea": phrases.IN_THE_SEA},
    _only(phrases.TAGS, world.PLACES),
)
_TIME_WORDS = _telling(
    phrases.TIMES, phrases.CLEAR_TIMES, phrases.TIME_NOUNS, _only(phrases.TAGS, world.TIMES)
)
_WEATHER_WORDS = _telling(phrases.WEATHERS, phrases.WEATHER_ADJECTIVES, _only(phrases.TAGS, world.WEATHERS))
# "an illustration of" says nothing of a style; that of postcards goes without saying.
_STYLE_WORDS = {
    style: words - set(_words(" ".join(phrases.OPENINGS)))
    for style, words in _telling(sprite_phrases.STYLES).items()
}
