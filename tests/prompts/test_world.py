"""Prompts in other words than a small model's: what is drawn for them, what is told, and tables on disk."""

import json

import pytest

from ldm.errors import UserError
from ldm.prompts.world import MAX_BYTES, World, as_drawn, read_world

WORLD = World(
    things=(
        (("dog", "dogs"), ("hound", None)),
        (("llama", "llamas"),),
        (("polar bear", "polar bears"),),
        (("hourglass", "hourglasses"),),
        (("jeans", None),),
        (("wizard", "wizards"),),
    ),
    words={
        "puppy": "dog",
        "wolf": "dog",
        "ice bear": "polar bear",
        "alpaca": "llama",
        "egg timer": "hourglass",
        "trousers": "jeans",
        "postman": "wizard",
        "vintage": "llama",
    },
    near={"cat": "dog"},
    styles=("flat", "3d"),
)


def drawn(text, seen=()):
    return as_drawn(text, WORLD.drawn_as([text], frozenset(seen)))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a puppy", "a dog"),
        ("two puppies, three wolves and two postmen", "two dogs, three dogs and two wizards"),
        ("two hounds", "two dogs"),  # captions have one hound, and never two
        ("a hound", "a hound"),
        ("An alpaca on an old alpaca", "A llama on an old llama"),
        ("a egg timer, an Egg  Timer", "an hourglass, an hourglass"),
        ("ice bears and an ice bear", "polar bears and a polar bear"),
        ("a pair of trousers", "a pair of jeans"),
        ("the puppy's nose", "the dog's nose"),
        ("a (puppy:1.3) [an ((alpaca))] [puppy:dog:0.5] AND a puppy :0.4", None),
        ("puppyish, puppy-like, a guard-puppy", "puppyish, puppy-like, a guard-puppy"),
        ("a puppy dog", "a puppy dog"),
        ("a vintage blue wizard", "a vintage blue wizard"),
        ("a vintage, a dog", "a llama, a dog"),
        ("a puppy with a dog", "a dog with a dog"),
        ("a puppy BREAK a dog", "a dog BREAK a dog"),
        ("<\u2028\udcff> İ puppy (", "<\u2028\udcff> İ dog ("),
        ("", ""),
    ],
)
def test_other_names_are_drawn_as_the_thing(text, read):
    if read is None:
        read = "a (dog:1.3) [a ((llama))] [dog:dog:0.5] AND a dog :0.4"
    assert drawn(text) == read


def test_what_the_model_has_seen_stays_as_it_is_written():
    assert drawn("a puppy and an ice bear", {"puppy", "ice"}) == "a dog and a polar bear".replace(
        "dog", "puppy"
    )
    assert drawn("an ice bear", {"ice", "bear"}) == "an ice bear"


def test_words_are_decided_for_all_texts_of_a_request_alike():
    assert WORLD.drawn_as(["a vintage wizard", "a vintage"]) == ()
    assert WORLD.drawn_as(["a puppy", "no Puppies"]) == (("puppy", "dog"), ("puppies", "dogs"))


@pytest.mark.parametrize(
    ("word", "things"),
    [
        ("cats", ("dog",)),
        ("wizzard", ("wizard",)),
        ("alpacca", ("llama",)),  # by another name of it
        ("hourgass", ("hourglass",)),
        ("xylophone", ()),
    ],
)
def test_the_nearest_things_to_an_unknown_word(word, things):
    assert WORLD.nearest(word) == things


def test_things_are_told_with_their_article():
    told = [WORLD.told(name) for name in ("dog", "hourglass", "dogs", "jeans")]
    assert told == ["a dog", "an hourglass", "dogs", "jeans"]


def test_a_table_is_written_and_read(tmp_path):
    WORLD.write(tmp_path / "world.json")
    assert read_world(tmp_path / "world.json") == WORLD
    assert read_world(tmp_path / "other.json") is None
    assert read_world(tmp_path / "world.json" / "world.json") is None
    assert list(WORLD.lines())[:2] == [
        "things (6): dog (hound), llama, polar bear, hourglass, jeans, wizard",
        "styles: flat, 3d",
    ]
    large = World(things=WORLD.things, words={f"word{i}" * 8: "dog" for i in range(3000)})
    with pytest.raises(UserError, match="102400 are read"):
        large.write(tmp_path / "large.json")
    assert not (tmp_path / "large.json").exists()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object|valid dictionary"),
        ('{"things": [[["dog", "dogs"]]], "places": "sea"}', r"places: .*(tuple|array)"),
        ('{"things": [[["dog"]]]}', r"things\.0\.0"),
        ('{"things": [], "colors": []}', "colors: Extra"),
        ('{"things": [[["dog", null]]], "words": {"puppy": "dgo"}}', "'dgo' is the plain name of no thing"),
        (json.dumps({"things": [], "styles": ["a" * MAX_BYTES]}), "more than 100 KiB"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, text, fault):
    path = tmp_path / "world.json"
    path.write_text(text)
    with pytest.raises(UserError, match=fault) as error:
        read_world(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
