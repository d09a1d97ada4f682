"""Telling a scene in English: many styles, every claim true; `full_caption` names all in one plain way."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldm.postcards import phrases
from ldm.postcards.scene import Group, Scene
from ldm.postcards.vocabulary import COLOURS, SHAPES


@dataclass(frozen=True)
class Mentions:
    """What a caption speaks of; where it speaks of things at all, kinds and counts are always named."""

    colour: bool = True
    place: bool = True
    time: bool = True
    weather: bool = True
    position: bool = False
    things: bool = True


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many ways to tell the scene, from one word to about thirty."""
    mentions = _sample_mentions(scene, rng)
    style = rng.random()
    if not mentions.things:
        text = scenery(scene, mentions, rng)
    elif style < 0.1:
        text = _tags(scene, mentions, rng)
    elif style < 0.2 and mentions.place:
        text = _place_first(scene, mentions, rng)
    elif style < 0.35 and (mentions.place or mentions.time or mentions.weather):
        text = _sentence(scene, mentions, rng)
    else:
        text = _phrase(scene, mentions, rng)
    text = with_articles(text)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.15 else text


def full_caption(scene: Scene) -> str:
    """Kinds, colours, counts, relation, place, time and weather, always in the same words."""
    things = [_full_group(group) for group in scene.groups]
    if scene.relation is not None:
        things = [f"{things[0]} {phrases.RELATIONS[scene.relation][0]} {things[1]}"]
    where = _WHERE[scene.place]
    if not things:
        where = where.split(" ", 1)[1]
    elif _realms(scene) == {"air"}:
        where = f"over {where.split(' ', 1)[1]}"
    time, weather = phrases.TIMES[scene.time][0], phrases.WEATHERS[scene.weather][0]
    return with_articles(" ".join([*things, where, time, weather]))


_WHERE = {
    "sea": "on the sea",
    "beach": "on the beach",
    "meadow": "in a meadow",
    "mountains": "in the mountains",
    "forest": "in a forest",
    "desert": "in the desert",
    "city": "in the city",
}


def words() -> list[str]:
    """Every word that a caption can have, lower-case, sorted."""
    tables = [value for name, value in vars(phrases).items() if name.isupper()]
    texts = [*COLOURS, *_WHERE.values(), "a", "an", "and", "with", *_strings(tables)]
    return sorted({word for text in texts for word in split(text)})


def split(text: str) -> list[str]:
    """The words of a text, lower-case, without marks."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z]+)*", text.lower())


def with_articles(text: str) -> str:
    """The text with "an" for "a" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _strings(table: object) -> Iterator[str]:
    if isinstance(table, str):
        yield table
    elif isinstance(table, dict):
        yield from _strings(list(table.values()))
    elif isinstance(table, (list, tuple)):
        for entry in table:
            yield from _strings(entry)


def _sample_mentions(scene: Scene, rng: random.Random) -> Mentions:
    if scene.groups and rng.random() < 0.05:
        return Mentions(rng.random() < 0.7, place=False, time=False, weather=False)
    alone = len(scene.groups) == 1 and scene.groups[0].count == 1
    things = bool(scene.groups) and rng.random() >= 0.03
    return Mentions(
        colour=rng.random() < 0.93,
        place=rng.random() < 0.84 or not things,
        time=rng.random() < 0.79,
        weather=rng.random() < (0.21 if scene.weather == "clear" else 0.79),
        position=alone and scene.groups[0].position is not None and rng.random() < 0.35,
        things=things,
    )


# --- styles ------------------------------------------------------------------------------------------------


def _phrase(scene: Scene, mentions: Mentions, rng: random.Random) -> str:
    """ "a red car on the left in the desert at night", "there are two blue tents on a rainy beach" """
    opening = rng.random()
    subject = _subject(scene, mentions, rng, article=opening < 0.96)
    circumstances = _circumstances(scene, mentions, rng)
    if mentions.position:
        spot = _position(scene, rng)
        if rng.random() < 0.25:
            return " ".join([f"{spot}, {subject}", *circumstances])
        subject = f"{subject} {spot}"
    if opening < 0.12:
        subject = f"{rng.choice(phrases.OPENINGS)} {subject}"
    elif opening < 0.17:
        there = rng.choice(phrases.EXISTS_MANY if scene.groups[0].count > 1 else phrases.EXISTS_ONE)
        subject = f"{there} {subject}"
    return " ".join([subject, *circumstances])


def _sentence(scene: Scene, mentions: Mentions, rng: random.Random) -> str:
    """ "at night, a red car stands in a snowy forest" """
    circumstances = _circumstances(scene, mentions, rng)
    group = scene.groups[0]
    if mentions.position:
        circumstances.insert(rng.randrange(len(circumstances) + 1), _position(scene, rng))
    front = circumstances.pop() if rng.random() < 0.65 else None
    subject = _subject(scene, mentions, rng)
    if len(scene.groups) == 1:
        realm = SHAPES[group.kind].realm
        verb = rng.choice(phrases.KIND_VERBS.get(group.kind) or phrases.VERBS[realm])[group.count > 1]
        # "a red car is" needs something after it.
        if circumstances or verb not in ("is", "are", "is parked", "are parked"):
            subject = f"{subject} {verb}"
    text = " ".join([subject, *circumstances])
    return f"{front}, {text}" if front else text


def _place_first(scene: Scene, mentions: Mentions, rng: random.Random) -> str:
    """ "a snowy forest at night with a red car on the left" """
    spot = [_position(scene, rng)] if mentions.position else []
    return " ".join([scenery(scene, mentions, rng), "with", _subject(scene, mentions, rng), *spot])


def scenery(scene: Scene, mentions: Mentions, rng: random.Random) -> str:
    """ "a snowy forest at night" """
    adjective, rest = split_weather(scene, mentions, rng)
    return " ".join([fill(phrases.SCENERY[scene.place], adjective, scene, rng), *rest])


def _tags(scene: Scene, mentions: Mentions, rng: random.Random) -> str:
    """ "red car, desert, night" """
    tags = [_group(group, mentions, rng, article=False) for group in scene.groups]
    if scene.relation is not None and rng.random() < 0.5:
        tags = [_subject(scene, mentions, rng)]
    for said, fact in (
        (mentions.place, scene.place),
        (mentions.time, scene.time),
        (mentions.weather, scene.weather),
    ):
        if said:
            tags.append(rng.choice(phrases.TAGS[fact]))
    if mentions.position:
        tags.insert(1, _position(scene, rng))
    return ", ".join(tags)


# --- parts -------------------------------------------------------------------------------------------------


def _subject(scene: Scene, mentions: Mentions, rng: random.Random, *, article: bool = True) -> str:
    """All things, and of two how they stand to each other."""
    groups = [_group(group, mentions, rng, article=article) for group in scene.groups]
    if scene.relation is None:
        return groups[0]
    return relate(groups, scene.relation, rng, (0.42, 0.84, 0.92))


def relate(two: Sequence[str], relation: str, rng: random.Random, forms: tuple[float, float, float]) -> str:
    """Two things and how the first stands to the second.

    forms: below which number of 0..1 the relation is told as it is, inverted, and by both places.
    """
    first, second = two
    form, (straight, inverse, places) = rng.random(), forms
    if form < straight:
        return f"{first} {rng.choice(phrases.RELATIONS[relation])} {second}"
    if form < inverse:
        return f"{second} {rng.choice(phrases.INVERSE[relation])} {first}"
    if relation == "above":
        return f"{first} and {second}"
    if form < places:
        return f"{first} on the left and {second} on the right"
    if rng.random() < 0.5:
        first, second = second, first
    return f"{first} {rng.choice(phrases.BESIDE)} {second}"


def _group(group: Group, mentions: Mentions, rng: random.Random, *, article: bool = True) -> str:
    """ "a big red car", "two snowmen with blue scarves", "red car" """
    several = group.count > 1
    parts = [_count(group, rng)] if several else ["a"] if article else []
    if rng.random() < 0.12:
        parts.append(rng.choice(phrases.ADJECTIVES))
    noun = rng.choice(phrases.NOUNS[group.kind])[several] if rng.random() < 0.4 else _noun(group)
    if not mentions.colour:
        return " ".join([*parts, noun])
    colour = rng.choice(phrases.COLOUR_WORDS.get(group.colour, (group.colour,)))
    if group.kind == "snowman" and rng.random() < 0.6:
        dress = rng.choice(phrases.SNOWMEN if several else phrases.SNOWMAN)
        return " ".join([*parts, noun, dress.replace("{}", colour)])
    return " ".join([*parts, colour, noun])


def _noun(group: Group) -> str:
    return phrases.NOUNS[group.kind][0][group.count > 1]


def _count(group: Group, rng: random.Random) -> str:
    return rng.choice(phrases.NUMBERS[group.count])


def _full_group(group: Group) -> str:
    number = {1: "a", 2: "two", 3: "three"}[group.count]
    if group.kind == "snowman":
        dress = (phrases.SNOWMEN if group.count > 1 else phrases.SNOWMAN)[0]
        return f"{number} {_noun(group)} {dress.format(group.colour)}"
    return f"{number} {group.colour} {_noun(group)}"


def _position(scene: Scene, rng: random.Random) -> str:
    return rng.choice(phrases.POSITIONS[scene.groups[0].position or "middle"])


def _circumstances(scene: Scene, mentions: Mentions, rng: random.Random) -> list[str]:
    """Where, when and in what weather, in one order or another."""
    adjective, rest = split_weather(scene, mentions, rng, slot=mentions.place)
    where = [_where(scene, adjective, rng)] if mentions.place else []
    if rng.random() < 0.2:
        rng.shuffle(rest)
        return rest + where
    return where + rest


def _where(scene: Scene, adjective: str, rng: random.Random) -> str:
    realms = _realms(scene)
    if realms == {"air"}:
        templates: tuple[str, ...] = phrases.OVER[scene.place]
    elif scene.place == "sea" and "ground" in realms:
        templates = phrases.IN_THE_SEA
    else:
        templates = phrases.PLACES[scene.place]
    return fill(templates, adjective, scene, rng)


def _realms(scene: Scene) -> set[str]:
    return {SHAPES[group.kind].realm for group in scene.groups}


def fill(templates: tuple[str, ...], adjective: str, scene: Scene, rng: random.Random) -> str:
    """One of the templates that have room for the adjective, if there is one, and are true in the snow."""
    if adjective:
        templates = tuple(template for template in templates if "{}" in template)
    if scene.weather == "snow":
        templates = tuple(t for t in templates if not any(word in t for word in phrases.GREENERY))
    return rng.choice(templates).format(adjective)


def split_weather(
    scene: Scene, mentions: Mentions, rng: random.Random, *, slot: bool = True
) -> tuple[str, list[str]]:
    """The adjective of the place, with its space, and the phrases for time and weather."""
    weather, adjective = mentions.weather, ""
    if weather and slot and scene.weather != "clear" and rng.random() < 0.3:
        weather = False
        adjective = rng.choice(phrases.WEATHER_ADJECTIVES[scene.weather]) + " "
    elif slot and rng.random() < 0.1:
        adjective = rng.choice(phrases.PLACE_ADJECTIVES) + " "
    if (
        mentions.time
        and (weather or (scene.weather == "clear" and rng.random() < 0.4))
        and rng.random() < 0.3
    ):
        return adjective, [_time_and_weather(scene, rng)]
    rest = [rng.choice(phrases.TIMES[scene.time])] if mentions.time else []
    if weather:
        rest.append(rng.choice(phrases.WEATHERS[scene.weather]))
    return adjective, rest


def _time_and_weather(scene: Scene, rng: random.Random) -> str:
    if scene.weather == "clear":
        return rng.choice(phrases.CLEAR_TIMES[scene.time])
    adjective = rng.choice(
        [word for word in phrases.WEATHER_ADJECTIVES[scene.weather] if "covered" not in word]
    )
    return f"on a {adjective} {rng.choice(phrases.TIME_NOUNS[scene.time])}"
