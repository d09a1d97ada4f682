"""Telling a scene of sprites in English: many forms, every claim true; landscapes as postcards tell them.

Things that postcards show too (a car, a house) are always told with their style, so that such a prompt
without a style goes on to mean the postcard.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from ldm.postcards import captions as told
from ldm.postcards import phrases as usual
from ldm.postcards import wording
from ldm.postcards.sprites import phrases
from ldm.postcards.sprites.scene import PLAIN, TABLE, Group, Scene

_POSTCARD_NOUNS = {noun for pairs in usual.NOUNS.values() for pair in pairs for noun in pair}


@dataclass(frozen=True)
class _Said:
    """What a caption speaks of: the circumstances, the style's form ("" for none), the position."""

    circumstances: told.Mentions
    style: str
    position: str | None


def caption(seen: Scene, rng: random.Random, *, new: bool = False) -> str:
    """One of the many ways to tell the scene; with `new` in words that no training caption has."""
    groups = [_group(group, seen, rng) for group in seen.groups]
    said = _choose(seen, rng)
    if new:
        return _new(seen, groups, said, rng)
    form = rng.random()
    if form < 0.1:
        text = _tags(seen, groups, said, rng)
    elif form < 0.2 and (said.circumstances.place or not seen.outdoors):
        text = _place_first(seen, groups, said, rng)
    else:
        text = _phrase(seen, groups, said, rng, inverted=form < 0.3)
    text = articles(text)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.12 else text


def reword(text: str, seen: Scene, rng: random.Random) -> str:
    """A caption in other words with the same meaning; the names of things stay."""
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"zq{len(kept) - 1}"

    names = {name for group in seen.groups for name in names_of(group)}
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    hidden = re.sub(rf"(?<![\w-])(?:{either})(?![\w-])", keep, text, flags=re.IGNORECASE)
    changed = wording.reword(hidden, rng)
    return articles(re.sub(r"zq(\d+)", lambda match: kept[int(match[1])], changed, flags=re.IGNORECASE))


def full_caption(seen: Scene) -> str:
    """Counts, sizes, colours, things, relation, place, time, weather and style, always in the same words."""
    things = [_plain_group(group, seen.size) for group in seen.groups]
    if seen.relation:
        things = [f"{things[0]} {usual.RELATIONS[seen.relation][0]} {things[1]}"]
    where = [phrases.PLAIN[0].format(seen.backdrop) if seen.place == PLAIN else phrases.TABLE[0]]
    if seen.outdoors:
        aloft = all(group.thing.realm == "air" for group in seen.groups)
        where = [(usual.OVER if aloft else usual.PLACES)[seen.place][0].format("")]
        where += [usual.TIMES[seen.time][0], usual.WEATHERS[seen.weather][0]]
    return articles(f"{' '.join([*things, *where])}, {phrases.STYLES[seen.style][0][0]}")


def articles(text: str) -> str:
    """The text with "an" where it is said: an hourglass, a unicorn."""
    text = told.with_articles(text)
    text = re.sub(r"\b([Aa])n (?=(?:unicorn|ukulele|UFO|ufo|one)\b)", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=hourglass)", r"\1n ", text)


def names_of(group: Group) -> tuple[str, ...]:
    """Everything that a caption may call the group's things."""
    thing = group.thing
    return (thing.plural or thing.noun,) if group.count > 1 else (thing.noun, *thing.also)


def _choose(seen: Scene, rng: random.Random) -> _Said:
    named = any(name in _POSTCARD_NOUNS for group in seen.groups for name in names_of(group))
    style = rng.choice(("after", "after", "before", "adjective")) if named or rng.random() < 0.65 else ""
    alone = len(seen.groups) == 1 and seen.groups[0].count == 1
    spot = seen.groups[0].position if alone and rng.random() < 0.3 else None
    circumstances = told.Mentions(
        place=seen.outdoors and rng.random() < 0.88,
        time=seen.outdoors and rng.random() < 0.75,
        weather=seen.outdoors and rng.random() < (0.2 if seen.weather == "clear" else 0.8),
    )
    return _Said(circumstances, style, spot)


# --- forms -------------------------------------------------------------------------------------------------


def _phrase(seen: Scene, groups: list[str], said: _Said, rng: random.Random, *, inverted: bool) -> str:
    """ "a red teapot on a table, 3d render", "at night, a 3d hedgehog in a snowy forest" """
    subject = _subject(seen, groups, said, rng)
    around = _around(seen, said, rng)
    if said.style == "before":
        subject = f"{rng.choice(phrases.STYLES[seen.style][1])} of {subject}"
    elif rng.random() < 0.1:
        subject = f"{rng.choice(usual.OPENINGS)} {subject}"
    elif inverted and around and seen.outdoors:
        *rest, front = around
        return _styled(f"{front}, {' '.join([subject, *rest])}", seen, said, rng)
    return _styled(" ".join([subject, *around]), seen, said, rng)


def _place_first(seen: Scene, groups: list[str], said: _Said, rng: random.Random) -> str:
    """ "a snowy forest at night with a hedgehog", "a table with a red teapot" """
    if seen.place == PLAIN:
        first = rng.choice(phrases.PLAIN_FIRST).format(seen.backdrop)
    elif seen.place == TABLE:
        first = rng.choice(phrases.TABLE_FIRST)
    else:
        first = f"{told.scenery(seen.postcard(), said.circumstances, rng)} with"
    text = f"{first} {_subject(seen, groups, said, rng)}"
    if said.style == "before":
        text = f"{rng.choice(phrases.STYLES[seen.style][1])} of {text}"
    return _styled(text, seen, said, rng)


def _tags(seen: Scene, groups: list[str], said: _Said, rng: random.Random) -> str:
    """ "hedgehog, forest, night, 3d" """
    tags = [_subject(seen, groups, said, rng)]
    if len(groups) == 1:
        tags[0] = tags[0].removeprefix("a ")
    if seen.place == PLAIN:
        tags.append(rng.choice(phrases.PLAIN_TAGS).format(seen.backdrop))
    elif seen.place == TABLE:
        tags.append(rng.choice(phrases.TABLE_TAGS))
    facts = (seen.place, seen.time, seen.weather)
    mentions = (said.circumstances.place, said.circumstances.time, said.circumstances.weather)
    tags += [rng.choice(usual.TAGS[fact]) for fact, mention in zip(facts, mentions, strict=True) if mention]
    if said.style and said.style != "adjective":
        tags.append(rng.choice(phrases.STYLES[seen.style][0]))
    return ", ".join(tags)


def _new(seen: Scene, groups: list[str], said: _Said, rng: random.Random) -> str:
    subject = _subject(seen, groups, _Said(said.circumstances, "", said.position), rng)
    if seen.outdoors:
        around = _around(seen, said, rng)
    else:
        around = [rng.choice(phrases.NEW_PLAIN if seen.place == PLAIN else phrases.NEW_TABLE)]
    text = " ".join([subject, *around]).format(seen.backdrop)
    text = f"{text}, {rng.choice(phrases.NEW_STYLES[seen.style])}" if said.style else text
    return reword(f"{rng.choice(phrases.NEW_OPENINGS)} {articles(text)}", seen, rng)


# --- parts -------------------------------------------------------------------------------------------------


def _styled(text: str, seen: Scene, said: _Said, rng: random.Random) -> str:
    return f"{text}, {rng.choice(phrases.STYLES[seen.style][0])}" if said.style == "after" else text


def _subject(seen: Scene, groups: list[str], said: _Said, rng: random.Random) -> str:
    """All things, and of two how they stand to each other."""
    groups = list(groups)
    if said.style == "adjective":
        word = rng.choice(phrases.STYLES[seen.style][2])
        groups = [re.sub(r"^(a pair of |a |two |2 |three |3 |)", rf"\g<1>{word} ", group) for group in groups]
    if seen.relation is None:
        spot = [rng.choice(usual.POSITIONS[said.position])] if said.position else []
        return " ".join([groups[0], *spot])
    return told.relate(groups, seen.relation, rng, (0.35, 0.65, 0.72))


def _around(seen: Scene, said: _Said, rng: random.Random) -> list[str]:
    """Where, when and in what weather."""
    if seen.place == PLAIN:
        return [rng.choice(phrases.PLAIN).format(seen.backdrop)]
    if seen.place == TABLE:
        return [rng.choice(phrases.TABLE)]
    postcard, mentions = seen.postcard(), said.circumstances
    adjective, rest = told.split_weather(postcard, mentions, rng, slot=mentions.place)
    aloft = all(group.thing.realm == "air" for group in seen.groups)
    templates = (usual.OVER if aloft else usual.PLACES)[seen.place]
    where = [told.fill(templates, adjective, postcard, rng)] if mentions.place else []
    return [*rest, *where] if rng.random() < 0.15 else [*where, *rest]


def _group(group: Group, seen: Scene, rng: random.Random) -> str:
    """ "a big red teapot", "a pair of blue gloves", "two hedgehogs", "spaghetti"

    A paint is always told: a tiger of which nothing is said is as tigers are.
    """
    name, article = rng.choice(names_of(group)) if rng.random() < 0.3 else names_of(group)[0], "a"
    if name == group.thing.noun:
        article = group.thing.article
    elif name in phrases.MASS:
        article = ""
    number = rng.choice(usual.NUMBERS[group.count]) if group.count > 1 else article
    size = rng.choice(phrases.SIZES[seen.size]) if seen.size else ""
    paint = rng.choice(usual.COLOUR_WORDS.get(group.colour, (group.colour,))) if group.colour else ""
    return " ".join(word for word in (number, size, paint, name) if word)


def _plain_group(group: Group, size: str) -> str:
    number = {1: group.thing.article, 2: "two", 3: "three"}[group.count]
    return " ".join(word for word in (number, size, group.colour, names_of(group)[0]) if word)
