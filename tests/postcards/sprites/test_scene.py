"""Scenes of sprites: what is kept from training, where things are, what is said of them as numbers."""

import random

import pytest

from ldm.postcards.sprites.labels import PAINTS, Labels, kind_number, thing_cells
from ldm.postcards.sprites.scene import (
    PLAIN,
    TABLE,
    make_world,
    sample_scene,
    unseen_colour,
    unseen_place,
    unseen_style,
)
from ldm.postcards.vocabulary import COLOURS, KINDS


@pytest.fixture(scope="module")
def world():
    return make_world(400, ("flat", "3d"))


@pytest.fixture(scope="module")
def scenes(world):
    rng = random.Random(0)
    return [sample_scene(world, rng) for _ in range(3000)]


def unseen(scene):
    """Which combinations of a scene are kept from training."""
    found = set()
    for group in scene.groups:
        thing = group.thing
        found |= {"colour"} if group.colour == unseen_colour(thing) else set()
        found |= {"place"} if scene.place == unseen_place(thing) else set()
        found |= {"style"} if scene.style == unseen_style(thing) else set()
    return found


def test_training_never_sees_what_is_kept_from_it(scenes):
    assert all(unseen(scene) == set() for scene in scenes)


@pytest.mark.parametrize("kind", ["colour", "place", "style"])
def test_each_kind_of_new_combination_can_be_asked_for(world, kind):
    rng = random.Random(1)
    for _ in range(100):
        scene = sample_scene(world, rng, unseen=kind)
        assert unseen(scene) == {kind}


def test_every_thing_is_seen_in_both_styles_unless_one_is_kept_from_it(world, scenes):
    rng = random.Random(2)
    more = [*scenes, *(sample_scene(world, rng) for _ in range(9000))]
    seen = {(group.thing.number, scene.style) for scene in more for group in scene.groups}
    every = {(thing.number, style) for thing in world.things for style in world.styles}
    assert every - seen == {(thing.number, unseen_style(thing)) for thing in world.things} & every


def test_things_stay_in_the_picture_and_do_not_touch(scenes):
    for scene in scenes:
        boxes = [box for group in scene.groups for box in group.boxes]
        realms = {group.thing.realm for group in scene.groups}
        for box in boxes:
            assert box.left >= 0.029
            assert box.right <= 0.971
            assert box.top >= 0
            assert box.bottom <= (1.041 if "portrait" in realms else 1)
            assert min(box.right - box.left, box.height) > 0.02
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a.left >= b.right or b.left >= a.right or a.top >= b.bottom or b.top >= a.bottom
                assert apart


def test_boxes_have_the_sprites_shape_and_relations_hold(scenes):
    for scene in scenes:
        for group in scene.groups:
            for box in group.boxes:
                shape = (box.right - box.left) / box.height
                assert shape == pytest.approx(group.thing.sprites[scene.style].aspect, rel=1e-6)
        if scene.relation == "left of":
            assert scene.groups[0].boxes[0].right < scene.groups[1].boxes[0].left
        if scene.relation == "above":
            assert scene.groups[0].boxes[0].bottom < scene.groups[1].boxes[0].top


def test_where_things_are(scenes):
    for scene in scenes:
        for group in scene.groups:
            realm = group.thing.realm
            assert realm != "icon" or scene.place == PLAIN
            assert realm not in ("ground", "table", "food", "portrait") or scene.place != "sea"
            assert scene.place != TABLE or realm in ("table", "food")
            assert group.colour is None or group.thing.sprites[scene.style].paintable
            assert scene.place != PLAIN or scene.backdrop != group.colour
    assert any(scene.place == TABLE for scene in scenes)


def test_the_same_seed_is_the_same_scene(world):
    assert sample_scene(world, random.Random("7")) == sample_scene(world, random.Random("7"))


def test_the_compositions_are_those_asked_for(world):
    rng = random.Random(3)
    for _ in range(50):
        assert sample_scene(world, rng, compositions={"three": 1}).groups[0].count == 3
        assert sample_scene(world, rng, compositions={"stacked": 1}).relation == "above"


# --- numbers -----------------------------------------------------------------------------------------------


def test_labels_say_the_scene(scenes):
    labels = Labels(400)
    for scene in scenes[:300]:
        numbers = labels.of(scene)
        assert numbers == sorted(set(numbers))
        assert numbers[0] >= 0
        assert numbers[-1] < labels.total
        kinds = [number for number in numbers if number < labels.kinds]
        assert kinds == sorted(len(KINDS) + group.thing.number for group in scene.groups)
        pairs = [
            number - labels.kinds for number in numbers if 0 <= number - labels.kinds < PAINTS * labels.kinds
        ]
        said = {
            (n // PAINTS - len(KINDS), None if n % PAINTS == 0 else COLOURS[n % PAINTS - 1]) for n in pairs
        }
        assert said == {(group.thing.number, group.colour) for group in scene.groups}
        firsts = [n for n in numbers if (1 + PAINTS) * labels.kinds <= n < (2 + PAINTS) * labels.kinds]
        assert len(firsts) == (scene.relation is not None)


def test_cells_name_the_things_in_their_rooms(scenes):
    for scene in scenes[:200]:
        grid = thing_cells(scene, 32)
        for group in scene.groups:
            for box in group.boxes:
                number = grid[min(31, int(32 * box.y)), int(32 * box.x)] - 1
                assert number // PAINTS == kind_number(group)
        assert grid[0, 0] == 0 or min(box.top for g in scene.groups for box in g.boxes) < 0.05
