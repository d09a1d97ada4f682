"""What models of these worlds know, as tables (`ldm.prompts.world`): for prompts in words that they do not.

`postcard_world` is of the 14 kinds that the postcards show, `sprite_world` of the sprites and the postcards
together. Names are those that captions have; other names come from `words.tsv`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm.postcards import phrases as usual
from ldm.postcards import wording
from ldm.postcards.sprites import phrases
from ldm.postcards.sprites.atlas import STYLES, Thing, load_things
from ldm.postcards.sprites.words import read_words
from ldm.postcards.vocabulary import COLOURS, KINDS, PLACES, TIMES, WEATHERS
from ldm.prompts.world import World

_Names = tuple[tuple[str, str | None], ...]

# Things of sprites that are no kind of any postcard's thing, beside which one of those is the nearest.
_NEAR = """
    cat: dog wolf fox bear panda polar-bear lion tiger leopard rabbit mouse hamster squirrel raccoon
    otter beaver koala poodle horse zebra unicorn donkey cow bison ram goat pig deer moose giraffe camel
    llama elephant mammoth rhinoceros hippopotamus monkey gorilla kangaroo sloth hedgehog bat; duck:
    bird chicken rooster chick turkey goose swan penguin eagle owl crow parrot peacock flamingo fish
    whale dolphin seal turtle frog; house: school shop church temple mosque pagoda factory stadium hut
    door window; car: truck taxi bus tram ambulance motorcycle scooter bicycle tractor wheelchair; tree:
    cactus seedling; flower: rose tulip daisy sunflower hibiscus; balloon: airplane helicopter parachute
    kite; rocket: satellite bomb; sailboat: canoe motorboat; snowman: man woman girl boy child baby king
    princess wizard robot doctor teacher; tent: umbrella
"""


def postcard_world() -> World:
    """Of a model that has seen the postcards alone."""
    near = dict(_near())
    others = {word: thing for word, (thing, _) in read_words().items()}
    names = {name for each in _kinds().values() for pair in each for name in pair}
    words = {word: thing for word, thing in others.items() if thing in KINDS and word not in names}
    meant = {word: near[thing] for word, thing in others.items() if thing in near}
    return World(
        things=tuple(_kinds().values()),
        words=words,
        near=dict(sorted((near | meant).items())),
        colours=COLOURS,
        places=PLACES,
        hours=TIMES,
        weathers=WEATHERS,
    )


def sprite_world(count: int | None = None, styles: Sequence[str] = STYLES) -> World:
    """Of a model of the `count` most usual sprites, all if None, in these styles, and of the postcards."""
    things = {thing.noun: _names(thing) for thing in load_things()[:count]}
    for kind, names in _kinds().items():
        own = things.get(kind, ())
        things[kind] = (*own, *(pair for pair in names if pair[0] not in {one for one, _ in own}))
    known = {name for names in things.values() for pair in names for name in pair}
    return World(
        things=tuple(things.values()),
        words={w: thing for w, (thing, _) in read_words().items() if thing in things and w not in known},
        styles=(*(phrases.STYLES[style][0][0] for style in styles), phrases.POSTCARD[0]),
        colours=COLOURS,
        places=(*PLACES, "table", "plain background"),
        hours=TIMES,
        weathers=WEATHERS,
    )


def _names(thing: Thing) -> _Names:
    """What captions call it; several of it only by its plain name."""
    return ((thing.noun, thing.plural), *((name, None) for name in thing.also))


def _kinds() -> dict[str, _Names]:
    """The postcards' kinds with all names that captions have, each once."""
    found: dict[str, _Names] = {}
    for kind, pairs in usual.NOUNS.items():
        ones, several = (each.split("|") for each in wording.NOUNS[kind])
        if len(ones) == len(several):
            plurals: dict[str, str | None] = dict(zip(ones, several, strict=True))
        else:  # some have no plural there, or share one
            plurals = {one: f"{one}s" if f"{one}s" in several else None for one in ones}
        found[kind] = tuple((plurals | dict(pairs)).items())
    return {
        kind: (*usual.NOUNS[kind], *(pair for pair in every if pair not in usual.NOUNS[kind]))
        for kind, every in found.items()
    }


def _near() -> list[tuple[str, str]]:
    entries = (entry.strip().partition(": ") for entry in " ".join(_NEAR.split()).split(";"))
    return [(word.replace("-", " "), kind) for kind, _, words in entries for word in words.split()]
