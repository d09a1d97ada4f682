"""Pictures of sprite scenes: pixels against the sprites' own, the mask against what changes."""

import random
from dataclasses import replace

import numpy as np
import pytest

from ldm.postcards.sprites import mixture
from ldm.postcards.sprites.atlas import pixels
from ldm.postcards.sprites.colour import backdrop
from ldm.postcards.sprites.picture import object_cells, render
from ldm.postcards.sprites.scene import PLAIN, make_world, sample_scene


@pytest.fixture(scope="module")
def scenes():
    world, rng = make_world(400, ("flat", "3d")), random.Random(5)
    return [sample_scene(world, rng) for _ in range(60)]


def test_a_picture_is_always_the_same_and_as_large_as_asked(scenes):
    for scene in scenes[:6]:
        drawn = render(scene, 128)
        assert drawn.shape == (128, 128, 3)
        np.testing.assert_array_equal(drawn, render(scene, 128))


def test_a_large_picture_is_the_small_one_in_detail(scenes):
    for scene in scenes[:12]:
        small, large = render(scene, 128).astype(float), render(scene, 256).astype(float)
        pooled = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.abs(pooled - small).mean() < 2.5


def test_on_a_plain_background_there_are_the_sprite_and_the_background(scenes):
    found = 0
    for scene in scenes:
        if scene.place != PLAIN or len(scene.groups) > 1 or scene.groups[0].colour:
            continue
        group, drawn = scene.groups[0], render(scene, 256).astype(float)
        np.testing.assert_allclose(drawn[0, 0], backdrop(scene.backdrop), atol=1)
        box, sprite = group.boxes[0], pixels(group.thing, scene.style)
        seen = drawn[
            round(256 * box.top) : round(256 * box.bottom), round(256 * box.left) : round(256 * box.right)
        ]
        alpha = sprite[..., 3:].astype(float) / 255
        wanted = (sprite[..., :3] * alpha + np.array(backdrop(scene.backdrop)) * (1 - alpha)).mean((0, 1))
        halo = min(group.thing.sprites[scene.style].mean) > 185
        np.testing.assert_allclose(seen.mean((0, 1)), wanted, atol=25 if halo else 4)
        found += 1
    assert found > 3


def test_cells_are_where_the_things_are(scenes):
    for scene in scenes[:20]:
        bare = replace(scene, groups=tuple(replace(group, boxes=()) for group in scene.groups))
        cells = object_cells(scene, 16)
        assert cells.shape == (16, 16)
        if scene.place == PLAIN:
            changed = np.abs(render(scene, 128).astype(int) - render(bare, 128)).sum(-1) > 24
            share = changed.reshape(16, 8, 16, 8).mean((1, 3))
            assert np.corrcoef(share.ravel(), cells.ravel())[0, 1] > 0.9
        assert not object_cells(bare, 16).any()


def test_a_mirrored_thing_is_its_mirror_image(scenes):
    scene = next(each for each in scenes if each.place == PLAIN and len(each.groups) == 1)
    group = scene.groups[0]
    box = replace(group.boxes[0], left=0.2, right=0.8)
    pair = [
        render(replace(scene, groups=(replace(group, boxes=(box,), flipped=flipped),)), 128)
        for flipped in (True, False)
    ]
    assert np.abs(pair[0][:, ::-1].astype(int) - pair[1]).mean() < 1.5


def test_a_colour_is_told_by_its_word_alone():
    rng, world = random.Random(1), make_world(60, ("flat",))
    scene = next(
        each
        for each in (sample_scene(world, rng, compositions={"one": 1}) for _ in range(999))
        if each.groups[0].colour == "red"
    )
    assert mixture.names_colours(scene, "A Red car")
    assert not mixture.names_colours(scene, "a crimson coloured car")


def test_another_paint_changes_only_the_thing():
    rng = random.Random(8)
    mixed = mixture.Mixture(make_world(400, ("flat",)), postcards=0.2)
    done = 0
    while done < 8:
        scene = mixed.sample(rng)
        other = mixture.repainted(scene, rng)
        if other is None:
            continue
        done += 1
        a, b = (mixture.render(each, 128).astype(int) for each in (scene, other))
        changed = (np.abs(a - b).sum(-1) > 30).reshape(16, 8, 16, 8).any((1, 3))
        assert changed.any()
        around = np.pad(mixture.object_cells(scene, 16) > 0, 1)  # white things have halos
        near = np.lib.stride_tricks.sliding_window_view(around, (3, 3)).any((2, 3))
        assert (changed <= near).all()
