"""Captions are read back with a parser of this file's own, and every claim is compared with the scene."""

import random
import re
from collections import Counter

import pytest

from ldm import postcards
from ldm.postcards.captions import split

NOUNS = {
    "house": "houses?|cottages?|homes?",
    "castle": "castles?|fortress(?:es)?",
    "car": "cars?|automobiles?|autos?",
    "tree": "(?:round |leafy )?trees?",
    "flower": "flowers?|blossoms?|blooms?(?= |$|[.,])",
    "mushroom": "mushrooms?|toadstools?",
    "cat": "cats?|kittens?|kitty|kitties",
    "snowman": "snow ?m[ae]n",
    "lighthouse": "light ?houses?",
    "tent": "(?:camping )?tents?",
    "sailboat": "sailboats?|(?:sailing )?boats?|yachts?|ships?",
    "duck": "(?:rubber )?ducks?|ducklings?",
    "balloon": "(?:hot air )?balloons?",
    "rocket": "(?:space )?rockets?|spaceships?",
}
COLOURS = {"crimson": "red", "scarlet": "red", "violet": "purple"} | {c: c for c in postcards.COLOURS}
COLOUR = "|".join(COLOURS)
CLOTHES = r"(?:hats?|scarf|scarves)(?: and (?:an? \w+ )?scar\w+)?"
DRESS = rf"(?: (?:with|in|wearing) (?:an? )?(?P<dress>{COLOUR}) {CLOTHES})?"
THING = re.compile(
    r"(?:(?P<count>two|2|a pair of|three|3|an?) )?(?:(?!two|three|pair)[a-z]+ )??"
    rf"(?:(?P<colour>{COLOUR}) )?"
    rf"(?P<noun>{'|'.join(f'(?P<{kind}>{nouns})' for kind, nouns in NOUNS.items())})(?![a-z-])" + DRESS
)
PLACES = {
    "sea": r"sea|ocean|seascape|waves",
    "beach": r"beach|seaside|shore",
    "meadow": r"meadow|grassy field|field|hills|countryside",
    "mountains": r"mountains?|alps",
    "forest": r"forest|woods",
    "desert": r"desert|dunes",
    "city": r"city|town|skyline|city street",
}
TIMES = {
    "dawn": r"dawn|sunrise|morning|daybreak|sun rises",
    "day": r"day|daytime|daylight|noon|midday|afternoon|sunshine",
    "sunset": r"sunset|dusk|evening|sun sets",
    "night": r"night|nighttime|midnight|stars|starry|moon|moonlight",
}
WEATHERS = {
    "clear": r"clear|sunny|sunshine|stars|starry|moon|moonlight|sun rises|sun sets",
    "cloudy": r"cloudy|clouds|overcast|grey",
    "rain": r"rain|rains|rainy|wet",
    "snow": r"snow|snows|snowy|wintry|winter|snow-covered",
}
POSITIONS = {"left": (0, 0.38), "middle": (0.44, 0.56), "right": (0.62, 1)}


def facts(text, table):
    """The names whose words are in the text."""
    return {name for name, pattern in table.items() if re.search(rf"(?<![a-z-])(?:{pattern})(?![a-z])", text)}


def things(text):
    # "blooms" is also what one flower does, "bloom" what several do.
    text = re.sub(r"(?<=flower) blooms|(?<=blossom) blooms|(?<=bloom) blooms|(?<=s) bloom\b", " grows", text)
    return list(THING.finditer(text))


def kind_of(match):
    return next(kind for kind in NOUNS if match[kind])


def relation(text, found):
    """(first, second) by the scene's convention, and how: of two things with words between them."""
    between = text[found[0].end() : found[1].start()]
    kinds = [kind_of(match) for match in found]
    if "left of" in between or ("on the left and" in between and text.count("on the right") == 1):
        return "left of", kinds
    if "right of" in between:
        return "left of", kinds[::-1]
    if re.search(r"\b(above|over)\b", between):
        return "above", kinds
    if re.search(r"\b(below|under|beneath|underneath)\b", between):
        return "above", kinds[::-1]
    return None, kinds


def told(n, seed=0):
    rng = random.Random(seed)
    for i in range(n):
        scene = postcards.sample_scene(rng, held_out=i % 5 == 4)
        yield scene, postcards.caption(scene, rng)


def without_snowmen(text):
    return re.sub(r"snow m[ae]n", "", text)


def test_things_counts_and_colours_are_true():
    for scene, caption in told(4000):
        groups = {group.kind: group for group in scene.groups}
        found = things(caption.lower().replace("green hills", "hills"))
        kinds = [kind_of(match) for match in found]
        assert not kinds or sorted(kinds) == sorted(groups), caption
        for match, kind in zip(found, kinds, strict=True):
            several = {"two": 2, "2": 2, "a pair of": 2, "three": 3, "3": 3}
            assert several.get(match["count"], 1) == groups[kind].count, caption
            colour = match["colour"] or match["dress"]
            assert colour is None or COLOURS[colour] == groups[kind].colour, caption


def test_no_colour_is_said_that_is_not_there():
    for scene, caption in told(3000, seed=1):
        said = {
            COLOURS[word] for word in split(caption.lower().replace("green hills", "")) if word in COLOURS
        }
        assert said <= {group.colour for group in scene.groups}, caption


def test_place_time_and_weather_are_true():
    for scene, caption in told(4000, seed=2):
        text = without_snowmen(caption.lower())
        assert facts(text, PLACES) <= {scene.place}, caption
        assert facts(text, TIMES) <= {scene.time}, caption
        assert facts(text, WEATHERS) <= {scene.weather}, caption


def test_relations_are_true_and_told_both_ways():
    seen = Counter()
    for scene, caption in told(6000, seed=3):
        text = caption.lower()
        found = things(text)
        if len(found) < 2:
            continue
        how, kinds = relation(text, found)
        seen[how, kinds[0] == scene.groups[0].kind] += 1
        if how is not None:
            assert how == scene.relation, caption
            assert kinds == [group.kind for group in scene.groups], caption
    assert seen["left of", True] > 100
    assert seen["above", True] > 100
    inverse = [c for _, c in told(3000, seed=4) if re.search(r"right of|\b(below|under|beneath) an? \w+ ", c)]
    assert len(inverse) > 50


def test_positions_are_true():
    seen = Counter()
    for scene, caption in told(6000, seed=5):
        if len(scene.groups) != 1:
            continue
        found = re.search(r"(?:on|at|in) the (left|right|middle|center|centre)\b(?! of)", caption.lower())
        if found:
            name = {"center": "middle", "centre": "middle"}.get(found[1], found[1])
            assert scene.groups[0].count == 1, caption
            low, high = POSITIONS[name]
            assert low <= scene.groups[0].x <= high, caption
            seen[name] += 1
    assert min(seen[name] for name in POSITIONS) > 50


def test_a_and_an():
    for _, caption in told(3000, seed=6):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption.lower()), caption
        assert not re.search(r"\{|\}|  | ,|^ | $", caption), caption
        assert not re.search(r"\b(is|are) (a|an|two|three|[23])\b", caption) or re.match(
            r"(?i)(there|this|here) (is|are) ", caption
        ), caption


def test_nothing_green_under_snow():
    for scene, caption in told(4000, seed=7):
        if scene.weather == "snow":
            assert "green hills" not in caption.lower()
            assert "grassy" not in caption.lower()


def test_words_are_exactly_those_that_captions_have():
    known, seen = set(postcards.words()), set()
    for scene, caption in told(30000, seed=8):
        seen |= set(split(caption)) | set(split(postcards.full_caption(scene)))
    assert seen <= known
    assert not known - seen
    assert postcards.words() == sorted(known)


def test_how_often_what_is_said():
    counts, n = Counter(), 6000
    rng = random.Random(9)
    for _ in range(n):
        scene = postcards.sample_scene(rng)
        caption = postcards.caption(scene, rng)
        text = without_snowmen(caption.lower())
        found = things(caption.lower().replace("green hills", "hills"))
        counts["things"] += bool(found)
        counts["groups"] += bool(scene.groups)
        counts["coloured"] += bool(found) and all(match["colour"] or match["dress"] for match in found)
        counts["place"] += bool(facts(text, PLACES))
        counts["time"] += bool(facts(text, TIMES))
        counts[f"{scene.weather} seen"] += 1
        counts[f"{scene.weather} said"] += bool(facts(text, WEATHERS))
        counts["capital"] += caption[0].isupper() and caption.endswith(".")
        counts["long"] += len(split(caption)) >= 15
        counts["short"] += len(split(caption)) <= 3
    assert counts["things"] / counts["groups"] == pytest.approx(0.97, abs=0.01)
    assert counts["coloured"] / counts["things"] == pytest.approx(0.91, abs=0.03)
    assert counts["place"] / n == pytest.approx(0.81, abs=0.03)
    assert counts["time"] / n == pytest.approx(0.75, abs=0.03)
    for weather in ("cloudy", "rain", "snow"):
        assert counts[f"{weather} said"] / counts[f"{weather} seen"] == pytest.approx(0.75, abs=0.04)
    assert counts["clear said"] / counts["clear seen"] == pytest.approx(0.23, abs=0.05)
    assert counts["capital"] / n == pytest.approx(0.15, abs=0.02)
    assert counts["long"] / n > 0.05
    assert counts["short"] / n > 0.03


def test_captions_are_many_and_of_all_lengths():
    captions = [caption for _, caption in told(3000, seed=10)]
    assert len(set(captions)) > 0.9 * len(captions)
    lengths = [len(split(caption)) for caption in captions]
    assert min(lengths) <= 2
    assert 20 <= max(lengths) <= 32


def test_caption_depends_on_the_generator_alone():
    scene = postcards.sample_scene(random.Random(0))
    assert postcards.caption(scene, random.Random(5)) == postcards.caption(scene, random.Random(5))


def test_full_caption_names_everything():
    rng = random.Random(11)
    for i in range(3000):
        scene = postcards.sample_scene(rng, held_out=i % 2 == 1)
        text = postcards.full_caption(scene)
        found = things(text)
        assert [kind_of(match) for match in found] == [group.kind for group in scene.groups], text
        for match, group in zip(found, scene.groups, strict=True):
            assert (match["colour"] or match["dress"]) == group.colour, text
            assert {"two": 2, "three": 3}.get(match["count"], 1) == group.count, text
        assert facts(text, PLACES) == {scene.place}, text
        assert facts(text, TIMES) == {scene.time}, text
        assert facts(without_snowmen(text), WEATHERS) == {scene.weather}, text
        if scene.relation is not None:
            assert relation(text, found)[0] == scene.relation, text


def test_full_caption_reads_like_this():
    box = postcards.Box(0.3, 0.4, 0.6, 0.9)
    cars = postcards.Group("car", "red", (box, box))
    scene = postcards.Scene("desert", "night", "rain", (cars,), seed=0)
    assert postcards.full_caption(scene) == "two red cars in the desert at night in the rain"
    boat = postcards.Group("sailboat", "orange", (box,))
    scene = postcards.Scene("sea", "dawn", "clear", (boat,), seed=0)
    assert postcards.full_caption(scene) == "an orange sailboat on the sea at dawn under a clear sky"
    scene = postcards.Scene("beach", "day", "snow", (), seed=0)
    assert postcards.full_caption(scene) == "the beach during the day in the snow"
