"""The tables of what models know: the shipped one, and the one of the sprites' world."""

import re

from ldm.checkpoint.folder import read_words
from ldm.files import weights_folder
from ldm.postcards.sprites.table import postcard_world, sprite_world
from ldm.postcards.vocabulary import KINDS
from ldm.prompts.world import TABLE, as_drawn, read_world

POSTCARD = weights_folder("postcard")


def test_the_embedded_model_says_what_it_knows_and_knows_it():
    world = read_world(POSTCARD / TABLE)
    assert world == postcard_world()
    assert tuple(world.plurals) == KINDS
    seen = read_words(POSTCARD / "words.txt")
    said = [*world.names, *world.colours, *world.places, *world.weathers]
    assert {word for name in said for word in re.findall(r"[a-z']+", name)} <= seen
    # What it has seen is drawn as written, whatever the table says.
    assert world.drawn_as(["a feline, a cabin, two spaceships, a vehicle"], seen) == ()
    assert world.drawn_as(["a limousine"], seen) == (("limousine", "car"),)
    assert world.nearest("wolves") == ("cat",)


def test_the_sprites_world_is_small_enough_to_ship(tmp_path):
    world = sprite_world(None, ("flat", "3d"))
    world.write(tmp_path / TABLE)  # raises
    assert read_world(tmp_path / TABLE) == world
    assert len(world.things) == 503  # with a lighthouse and a flower
    assert world.styles == ("flat illustration", "3d render", "postcard style")
    assert {"table", "sea"} <= set(world.places)
    text = "two ponies and an alpaca beside a rucksack"
    assert as_drawn(text, world.drawn_as([text])) == "two horses and a llama beside a backpack"


def test_a_smaller_world_has_names_of_its_own_things_only():
    world = sprite_world(20, ("noto",))
    assert set(world.words.values()) <= set(world.plurals)
    assert set(KINDS) <= set(world.plurals)
    assert world.plurals["dog"] == "dogs"
    assert world.drawn_as(["a rucksack"]) == ()
