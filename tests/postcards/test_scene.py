"""What sample_scene draws: frequencies, the hold-out rule, layout, labels."""

import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from ldm import postcards
from ldm.postcards import COLOURS, KINDS, PLACES, TIMES, WEATHERS, is_held_out
from ldm.postcards.vocabulary import SHAPES


def scenes(n, *, held_out=False, seed=0):
    rng = random.Random(seed)
    return [postcards.sample_scene(rng, held_out=held_out) for _ in range(n)]


def composition(scene):
    if not scene.groups:
        return "empty"
    return "pair" if len(scene.groups) == 2 else ("", "one", "two", "three")[scene.groups[0].count]


def test_the_world_is_as_large_as_promised():
    assert len(KINDS) >= 12
    assert len(COLOURS) >= 8
    assert len(PLACES) >= 6
    assert len(TIMES) >= 4
    assert len(WEATHERS) >= 4


def test_same_seed_same_scenes():
    assert scenes(50, seed=7) == scenes(50, seed=7)
    assert scenes(50, seed=7) != scenes(50, seed=8)


def test_scenes_need_neither_skia_nor_torch():
    code = (
        "import sys; sys.modules['skia'] = sys.modules['torch'] = None\n"
        "import random; from ldm import postcards as p; r = random.Random(0); s = p.sample_scene(r)\n"
        "p.caption(s, r); p.full_caption(s); p.encode_labels(s); p.words()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        postcards.paint  # noqa: B018


# --- hold-out ----------------------------------------------------------------------------------------------


def test_each_kind_loses_one_colour_and_each_colour_one_or_two_kinds():
    table = np.array([[is_held_out(kind, colour) for colour in COLOURS] for kind in KINDS])
    assert (table.sum(1) == 1).all()
    assert set(table.sum(0).tolist()) <= {1, 2}
    assert 0.10 <= table.mean() <= 0.14


def test_training_scenes_hold_no_held_out_pair():
    assert not any(is_held_out(g.kind, g.colour) for s in scenes(5000) for g in s.groups)


def test_held_out_scenes_hold_exactly_one_held_out_pair():
    drawn = scenes(3000, held_out=True)
    assert all(sum(is_held_out(g.kind, g.colour) for g in s.groups) == 1 for s in drawn)
    assert {composition(s) for s in drawn} == {"one", "pair"}
    pairs = {(g.kind, g.colour) for s in drawn for g in s.groups if is_held_out(g.kind, g.colour)}
    assert len(pairs) == len(KINDS)


# --- frequencies -------------------------------------------------------------------------------------------


def test_frequencies():
    drawn = scenes(8000)
    n = len(drawn)
    compositions = Counter(map(composition, drawn))
    for name, share in {"empty": 0.06, "one": 0.64, "two": 0.12, "three": 0.06, "pair": 0.12}.items():
        assert compositions[name] / n == pytest.approx(share, abs=0.02)
    relations = Counter(s.relation for s in drawn if len(s.groups) == 2)
    assert relations["above"] / relations.total() == pytest.approx(0.5, abs=0.05)
    kinds = Counter(s.groups[0].kind for s in drawn if composition(s) == "one")
    for kind in KINDS:
        assert kinds[kind] / kinds.total() == pytest.approx(1 / len(KINDS), abs=0.02)
    places = Counter(s.place for s in drawn)
    assert min(places[place] for place in PLACES) / n > 0.08
    for time in TIMES:
        assert sum(s.time == time for s in drawn) / n == pytest.approx(0.25, abs=0.02)
    assert sum(s.weather == "clear" for s in drawn) / n == pytest.approx(0.4, abs=0.02)
    differ = [s.groups[0].colour != s.groups[1].colour for s in drawn if len(s.groups) == 2]
    assert np.mean(differ) == pytest.approx(0.8, abs=0.05)


def test_every_seen_pair_is_drawn():
    seen = {(g.kind, g.colour) for s in scenes(8000) for g in s.groups}
    assert len(seen) == len(KINDS) * (len(COLOURS) - 1)


def test_single_things_are_on_the_left_in_the_middle_and_on_the_right():
    positions = Counter(s.groups[0].position for s in scenes(5000) if composition(s) == "one")
    for name in postcards.POSITIONS:
        assert positions[name] / positions.total() > 0.1


# --- layout ------------------------------------------------------------------------------------------------


def every_kind_of_scene():
    return scenes(3000) + scenes(1000, held_out=True)


def test_things_are_inside_apart_and_where_they_belong():
    for scene in every_kind_of_scene():
        boxes = [box for group in scene.groups for box in group.boxes]
        for box in boxes:
            assert 0.02 < box.left < box.right < 0.98
            assert 0.02 < box.top < box.bottom < 0.97
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                across = max(a.left, b.left) - min(a.right, b.right)
                down = max(a.top, b.top) - min(a.bottom, b.bottom)
                assert max(across, down) > 0.02
        for group in scene.groups:
            assert scene.place in postcards.vocabulary.places_for(group.kind)


def test_things_are_large():
    for scene in every_kind_of_scene():
        for group in scene.groups:
            for box in group.boxes:
                least = 0.38 if composition(scene) == "one" else 1 / 3
                assert box.height >= least or box.right - box.left >= 0.29
                assert box.height <= 0.66


def test_relations_are_true():
    for scene in every_kind_of_scene():
        if scene.relation is None:
            assert len(scene.groups) < 2
            continue
        first, second = (group.boxes[0] for group in scene.groups)
        assert scene.groups[0].kind != scene.groups[1].kind
        if scene.relation == "left of":
            assert first.right < second.left
        else:
            assert first.bottom < second.top
            assert first.left < second.x < first.right or second.left < first.x < second.right


def test_a_row_is_from_left_to_right():
    for scene in every_kind_of_scene():
        for group in scene.groups:
            assert [box.x for box in group.boxes] == sorted(box.x for box in group.boxes)


def test_boats_float_balloons_fly_houses_stand():
    for scene in every_kind_of_scene():
        for group in scene.groups:
            realm = SHAPES[group.kind].realm
            for box in group.boxes:
                if realm == "air":
                    assert box.top < 0.15
                elif scene.place == "beach" and realm == "water":
                    assert postcards.vocabulary.HORIZON["beach"] < box.bottom < postcards.vocabulary.SHORE
                else:
                    assert box.bottom > postcards.vocabulary.HORIZON[scene.place]


# --- labels ------------------------------------------------------------------------------------------------


def test_labels_say_what_the_scene_says():
    for scene in scenes(500):
        labels = postcards.encode_labels(scene)
        assert (PLACES[labels.place], TIMES[labels.time]) == (scene.place, scene.time)
        assert WEATHERS[labels.weather] == scene.weather
        groups = {group.kind: group for group in scene.groups}
        for k, kind in enumerate(KINDS):
            if kind not in groups:
                assert (labels.count[k], labels.colour[k], labels.position[k]) == (0, -1, -1)
                assert math.isnan(labels.x[k])
                assert math.isnan(labels.y[k])
                continue
            group = groups[kind]
            assert labels.count[k] == len(group.boxes)
            assert COLOURS[labels.colour[k]] == group.colour
            assert labels.x[k] == pytest.approx(np.mean([(b.left + b.right) / 2 for b in group.boxes]))
            assert labels.y[k] == pytest.approx(np.mean([(b.top + b.bottom) / 2 for b in group.boxes]))


def test_compositions_are_drawn_as_weighted():
    rng = random.Random(0)
    weights = {"one": 1, "beside": 2, "stacked": 1}
    drawn = [postcards.sample_scene(rng, compositions=weights) for _ in range(2000)]
    assert not any(is_held_out(g.kind, g.colour) for scene in drawn for g in scene.groups)
    counts = Counter(scene.relation for scene in drawn)
    assert counts["left of"] / 2000 == pytest.approx(0.5, abs=0.03)
    assert counts["above"] / 2000 == pytest.approx(0.25, abs=0.03)
    assert {composition(scene) for scene in drawn} == {"one", "pair"}
