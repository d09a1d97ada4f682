"""Reworded captions are read with tables of this file's own: they must say what the captions said."""

import random
import re

import pytest

from ldm import postcards
from ldm.postcards import captions, wording
from ldm.postcards.scoring.prompts import digest, evaluation_prompts

KINDS = {
    "house": "house, houses, cottage, cottages, home, homes, hut, huts, cabin, cabins, bungalow, bungalows, "
    "dwelling, dwellings",
    "castle": "castle, castles, fortress, fortresses, palace, palaces, fort, forts, citadel, citadels, "
    "stronghold, strongholds, chateau, chateaus",
    "car": "car, cars, automobile, automobiles, auto, autos, vehicle, vehicles, motorcar, motorcars",
    "tree": "tree, trees",
    "flower": "flower, flowers, blossom, blossoms, wildflower, wildflowers, flowering plant, "
    "flowering plants",
    "mushroom": "mushroom, mushrooms, toadstool, toadstools, toad stool, toad stools, fungus, fungi",
    "cat": "cat, cats, kitten, kittens, kitty, kitties, kitty cat, kitty cats, pussycat, pussycats, puss, "
    "feline, felines, house cat, house cats",
    "snowman": "snowman, snowmen, snow man, snow men, snow-man, snow-men, snowperson, snowpeople",
    "lighthouse": "lighthouse, lighthouses, light house, light houses, light-house, light-houses, beacon, "
    "beacons, light tower, light towers, beacon tower",
    "tent": "tent, tents, camping-tent, camping-tents",
    "sailboat": "sailboat, sailboats, boat, boats, yacht, yachts, ship, ships, sail-boat, sail-boats, "
    "dinghy, dinghies, vessel, vessels",
    "duck": "duck, ducks, duckling, ducklings, ducky, duckies, waterbird, waterbirds",
    "balloon": "balloon, balloons",
    "rocket": "rocket, rockets, spaceship, spaceships, space ship, space ships, spacecraft, rocket ship, "
    "rocket ships, rocketship, rocketships, starship, starships",
}
COLOURS = {
    "red": "red, crimson, scarlet, ruby, ruby red, cherry red, vermilion",
    "orange": "orange, tangerine",
    "yellow": "yellow, golden, gold, golden yellow, lemon yellow",
    "green": "green, emerald, emerald green, leaf green",
    "blue": "blue, azure, royal blue, cobalt blue, sapphire blue",
    "purple": "purple, violet, lilac, amethyst, deep purple",
    "pink": "pink, rosy, rose pink, rose-coloured, candy pink",
    "white": "white, snow-white, snow white, pure white, ivory white",
}
NUMBERS = {
    "2": "two, 2, pair of, couple of, duo of",
    "3": "three, 3, trio of, group of three, set of three",
}
THINGS = {**KINDS, **COLOURS, **NUMBERS}
FACTS = {
    "sea": "sea, ocean, waves, water, seascape, sea view",
    "beach": "beach, seaside, shore, seashore, coast, coastline",
    "meadow": "meadow, field, pasture, grassland, prairie, hills, countryside, rural",
    "mountains": "mountain, mountains, alps, alpine, mountainous, peaks, snow-capped peaks, "
    "snow-capped mountains, mountain peaks, highlands",
    "forest": "forest, woods, wood, woodland, woodlands",
    "desert": "desert, dunes, desert dunes, desert sands",
    "city": "city, town, skyline, cityscape, downtown, urban, metropolis",
    "dawn": "dawn, sunrise, daybreak, morning, first light, sunup, break of day",
    "day": "day, daytime, daylight, noon, midday, noontime, lunchtime, afternoon",
    "sunset": "sunset, dusk, evening, twilight, sundown, nightfall, end of the day, end of day",
    "night": "night, nighttime, midnight, dark, darkness",
    "clear": "clear, fair weather, fine weather, good weather, nice weather, cloudless",
    "cloudy": "cloudy, clouds, overcast, grey, gray, gloomy, dull",
    "rain": "rain, rains, rainy, wet, raining, rainfall, drizzle, drizzly, shower, showers, showery",
    "snow": "snow, snows, snowy, wintry, winter, snow-covered, snow-clad, snowing, snowfall, frosty, "
    "snowflakes, wintertime, falling snow",
    "dawn clear": "sun rises, sun rising, sun comes up, rising sun, fine morning, bright morning",
    "day clear": "sunny, sunshine, sun, sunlight, fine day, bright day",
    "sunset clear": "sun sets, setting sun, sun goes down, fine evening",
    "night clear": "stars, starry, starlight, moon, moonlight, moonlit",
}
# These hold words of the tables above, and mean others.
MASKED = r"light tower|snow[- ](?:white|m[ae]n)|snowm[ae]n"


def reader(table):
    """A function: the table's names in the order in which a text has their words."""
    names = {word: name for name, listed in table.items() for word in listed.split(", ")}
    words = any_of(names)
    return lambda text: [names[match[0]] for match in words.finditer(text)]


def any_of(names):
    longest = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"(?<![a-z0-9-])({longest})(?![a-z0-9]|-(?!colou?red))")


read_things, read_kinds, read_facts = reader(THINGS), reader(KINDS), reader(FACTS)
KIND_WORDS = any_of(", ".join(KINDS.values()).split(", "))
RELATIONS = (
    ("left", r"left(?:[- ]hand side| side)? of(?! (?:the )?(?:picture|image))"),
    ("right", r"right(?:[- ]hand side| side)? of(?! (?:the )?(?:picture|image))"),
    ("left, right", r"left\b.* and"),
    ("above", r"above|over"),
    ("below", r"below|under|beneath|underneath"),
)


def things(text):
    """Numbers, colours and kinds, in their order."""
    return read_things(re.sub(r"(?:rolling )?green hills|grassy hills", "hills", text.lower()))


def facts(text):
    """Place, time and weather that the text speaks of."""
    text = re.sub(MASKED, " ", text.lower())
    return {fact for named in read_facts(text) for fact in named.split()}


def relation(text):
    """How the text says that two things stand to each other: a name of RELATIONS, or None."""
    text = text.lower()
    spots = [match.span() for match in KIND_WORDS.finditer(text)]
    if len(spots) < 2:
        return None
    between = text[spots[0][1] : spots[-1][0]]
    return next((name for name, said in RELATIONS if re.search(rf"\b(?:{said})\b", between)), None)


def sides(text):
    """Left, right and middle, in their order."""
    said = re.findall(
        r"\b(left|right|middle|midst|center|centre)\b(?! of (?:the )?(?:day|night))", text.lower()
    )
    return [side if side in ("left", "right") else "middle" for side in said]


def told(n, seed=0):
    """Scenes, their captions, and these in other words."""
    rng = random.Random(seed)
    for i in range(n):
        scene = postcards.sample_scene(rng, held_out=i % 5 == 4)
        caption = postcards.caption(scene, rng)
        yield scene, caption, postcards.reword(caption, rng)


def test_things_keep_their_numbers_colours_and_order():
    seen = set()
    for _, caption, other in told(3000):
        assert things(other) == things(caption), (caption, other)
        seen.update(captions.split(other))
    assert {"hut", "palaces", "ruby", "lilac", "green-coloured", "trio"} <= seen


def test_relations_stay():
    kept = 0
    for _, caption, other in told(6000, seed=1):
        assert relation(other) == relation(caption), (caption, other)
        kept += relation(caption) is not None
    assert kept > 400


def test_sides_stay():
    for _, caption, other in told(3000, seed=2):
        assert sides(other) == sides(caption), (caption, other)


def test_place_time_and_weather_stay_and_are_true():
    for scene, caption, other in told(3000, seed=3):
        assert facts(other) == facts(caption), (caption, other)
        assert facts(other) <= {scene.place, scene.time, scene.weather}, (caption, other)


def test_form():
    for _, _, other in told(4000, seed=4):
        plain = other.lower()
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", plain), other
        assert not re.search(r"[{}|]|  |[,.!]{2}| [,.!]|^[ ,]|[ ,]$", other), other
        assert not re.search(r"\b(\w+) \1\b", plain), other


def test_names_of_several_words_are_replaced_whole():
    names = ("light house", "hot air balloon", "rubber duck", "camping tent", "space rocket", "snow man")
    rng = random.Random(5)
    for name in names:
        for _ in range(300):
            other = postcards.reword(f"a red {name}", rng).lower()
            assert len(read_kinds(other)) == 1, other


def test_times_of_several_words_stay_together():
    rng = random.Random(8)
    for _ in range(400):
        other = postcards.reword("a red car late at night", rng).lower()
        assert "late" not in other or re.search(r"late at night\b", other), other
        other = postcards.reword("a red car on a rainy night", rng).lower()
        assert re.search(r"on (?:a )?(?:rainy|drizzly|showery) night\b", other), other


def test_words_are_exactly_those_that_are_added():
    known, seen = set(wording.words()), set()
    for _, _, other in told(8000, seed=6):  # the rarest comes before 6,000
        seen |= set(captions.split(other))
    assert seen - set(captions.words()) == known
    assert wording.words() == sorted(known)


def test_the_generator_alone_decides_and_most_captions_change():
    pairs = [(caption, other) for _, caption, other in told(500, seed=7)]
    assert pairs == [(caption, other) for _, caption, other in told(500, seed=7)]
    assert sum(caption != other for caption, other in pairs) > 450


@pytest.mark.parametrize(("held_out", "expected"), [(False, "df6d733f3a46e67a"), (True, "ed60ed3951af3b86")])
def test_evaluation_prompts_are_not_reworded(held_out, expected):
    assert digest(evaluation_prompts(held_out=held_out)) == expected


def test_a_caption_that_says_all_colours_is_told_from_one_that_does_not():
    """By this file's words for colours; sceneries' own ("green hills") may pass for a thing's."""
    rng = random.Random(0)
    checked = {True: 0, False: 0}
    for _ in range(2000):
        scene = postcards.sample_scene(rng)
        text = wording.reword(postcards.caption(scene, rng), rng)
        said = [
            any(re.search(rf"\b{word}\b", text.lower()) for word in COLOURS[group.colour].split(", "))
            for group in scene.groups
        ]
        assert postcards.names_colours(scene, text) == all(said)
        checked[all(said) and bool(scene.groups)] += 1
    assert min(checked.values()) > 100
    house = postcards.Group("house", "green", (postcards.Box(0.5, 0.9, 0.5, 0.5),))
    scene = postcards.Scene("desert", "day", "clear", (house,), 0)
    assert postcards.names_colours(scene, "an Emerald-coloured house")
    assert not postcards.names_colours(scene, "a house in the greenhouse")
