"""Words that are no thing's name: the shipped table, and the rules on a WordNet of a few lines."""

import pytest

from ldm.postcards.sprites.atlas import FOLDER, load_things
from ldm.postcards.sprites.words import (
    TABLE,
    by_hand,
    keyword_words,
    read_wordnet,
    read_words,
    wordnet_words,
)


@pytest.fixture(scope="module")
def table():
    return read_words()


def test_the_table_is_small_and_knows_only_things(table):
    assert (FOLDER / TABLE).stat().st_size < 100 * 2**10
    things = load_things()
    names = {name.lower() for thing in things for name in (thing.noun, thing.plural, *thing.also) if name}
    assert {noun for noun, _ in table.values()} <= {thing.noun for thing in things}
    assert {how for _, how in table.values()} == {"same", "kind", "any"}
    assert not set(table) & names
    assert len(table) > 1000


@pytest.mark.parametrize(
    ("word", "thing"),
    [
        *[
            ("feline", "cat"),
            ("toad", "frog"),
            ("rucksack", "backpack"),
            ("limousine", "car"),
            ("salmon", "fish"),
        ],
        *[("palace", "castle"), ("cathedral", "church"), ("reindeer", "deer"), ("kettle", "teapot")],
        *[
            ("vehicle", "car"),
            ("animal", "dog"),
            ("hat", "top hat"),
            ("pony", "horse"),
            ("witch", "wizard"),
        ],
    ],
)
def test_everyday_words(table, word, thing):
    assert table[word][0] == thing


def test_what_nobody_wants_drawn_is_not_in_it(table):
    for word in (
        "bitch",
        "cock",
        "bimbo",
        "chink",
        "hag",
        "crack",
        "day",
        "city",
        "light",
        "garden",
        "young",
        "xylograph",
    ):
        assert word not in table


INDEX = b"""  1 a licence line
dog n 2 1 @ 2 2 00000003 00000004
hound n 1 1 @ 1 0 00000003
spaniel n 1 1 @ 1 1 00000005
thesis n 1 1 @ 1 1 00000006
animal n 1 1 @ 1 9 00000002
whippet n 1 1 @ 1 0 00000007
"""
DATA = b"""  1 a licence line
00000002 05 n 01 animal 0 000 | something that moves
00000003 05 n 02 dog 0 hound 0 001 @ 00000002 n 0000 | it barks
00000004 18 n 01 dog 0 000 | a person
00000005 05 n 01 spaniel 0 001 @ 00000003 n 0000 | long ears
00000006 10 n 01 thesis 0 001 @ 00000003 n 0000 | words
00000007 05 n 01 whippet 0 001 @ 00000005 n 0000 | fast
"""


def test_synonyms_kinds_and_what_is_above():
    senses, synsets, usual = read_wordnet(INDEX, DATA)
    assert senses["dog"] == ["00000003", "00000004"]
    assert (synsets["00000003"].words, synsets["00000003"].above) == (("dog", "hound"), ("00000002",))
    assert usual == {"dog", "spaniel", "thesis", "animal"}
    dog = next(thing for thing in load_things() if thing.noun == "dog")
    bare = type(dog)(0, dog.code, "dog", "dogs", "a", "ground", False, (), {})
    found = wordnet_words([bare], senses, synsets, usual)
    # A whippet is two levels away and WordNet's corpora have none; a thesis cannot be seen.
    assert {word: how for word, (_, how) in found.items()} == {
        "hound": "same",
        "spaniel": "kind",
        "animal": "any",
    }


def test_keywords_stand_by_one_thing():
    dog, cat = (thing for thing in load_things() if thing.noun in ("dog", "cat"))
    words = {"\N{DOG}": ["wag", "pet", "x"], "\N{CAT}": ["pet", "meow"], "\N{TIGER}": ["meow"]}
    assert keyword_words([dog, cat], words) == {"wag": dog}


def test_words_by_hand_name_things():
    assert by_hand(load_things())["queen"][0].noun == "princess"
