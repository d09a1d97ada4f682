"""The frozen prompts: what they are, what they claim, and that the file keeps it all."""

from collections import Counter, defaultdict

import pytest

from ldm import postcards
from ldm.errors import UserError
from ldm.postcards.scoring.frozen import FILE, choose_prompts, read_prompts, write_prompts
from ldm.postcards.scoring.names import is_outdoors, place_of, style_of
from ldm.postcards.scoring.prompts import digest, full_caption
from ldm.postcards.sprites.scene import PLAIN, Scene, unseen_colour, unseen_place, unseen_style


@pytest.fixture(scope="module")
def frozen():
    return read_prompts()


def unseen_of(scene):
    """Which combinations of a scene training never shows."""
    if not isinstance(scene, Scene):
        return {"colour" for group in scene.groups if postcards.is_held_out(group.kind, group.colour)}
    found = {"colour" for group in scene.groups if group.colour == unseen_colour(group.thing)}
    found |= {"place" for group in scene.groups if scene.place == unseen_place(group.thing)}
    return found | {"style" for group in scene.groups if scene.style == unseen_style(group.thing)}


def test_they_are_what_they_were(frozen):
    """Figures are compared over versions: who changes the file must see this fail."""
    assert digest([each.prompt for each in frozen]) == "b133d859309e7303"
    assert Counter(each.unseen for each in frozen) == {None: 1500, "colour": 330, "place": 260, "style": 110}


def test_what_is_kept_from_training_is_where_it_is_told(frozen):
    for each in frozen:
        assert unseen_of(each.prompt.scene) == ({each.unseen} if each.unseen else set()), each.prompt.text


def test_each_prompt_states_what_is_true_of_its_scene(frozen):
    for prompt in (each.prompt for each in frozen):
        scene = prompt.scene
        assert [named.colour for named in prompt.objects] == [group.colour for group in scene.groups]
        assert [named.count for named in prompt.objects] == [group.count for group in scene.groups]
        assert prompt.relation == scene.relation
        assert prompt.place in (None, place_of(scene))
        assert prompt.time in ((None, scene.time) if is_outdoors(scene) else (None,))
        assert prompt.weather in ((None, scene.weather) if is_outdoors(scene) else (None,))
        assert prompt.style in (None, style_of(scene))
        if prompt.text == full_caption(scene) and isinstance(scene, Scene):
            assert prompt.style == scene.style
            assert prompt.place == place_of(scene)


def test_every_thing_is_asked_for_alone_plain_and_in_a_scene(frozen):
    seen = defaultdict(list)
    for scene in (each.prompt.scene for each in frozen if each.unseen is None):
        if isinstance(scene, Scene) and len(scene.groups) == scene.groups[0].count == 1:
            seen[scene.groups[0].thing].append(scene)
    assert len(seen) == 400
    for thing, scenes in seen.items():
        places, styles = {scene.place == PLAIN for scene in scenes}, {scene.style for scene in scenes}
        assert places == ({True} if thing.realm == "icon" else {True, False}), thing.noun
        assert styles == {"flat", "3d"} - {unseen_style(thing)}, thing.noun


@pytest.mark.parametrize("things", [50, 100, 200])
def test_a_smaller_world_has_enough_of_them(things):
    part = read_prompts(things)
    scenes = [each.prompt.scene for each in part]
    numbers = [g.thing.number for scene in scenes if isinstance(scene, Scene) for g in scene.groups]
    assert max(numbers) == things - 1
    pairs = Counter(each.prompt.relation for each in part)
    assert pairs["left of"] >= things / 1.2
    assert pairs["above"] >= things / 2.2
    assert sum(each.unseen is not None for each in part) >= things


def test_a_file_gives_back_what_was_written(tmp_path):
    chosen = choose_prompts(seed=1)
    assert len({each.prompt.text for each in chosen} & {each.prompt.text for each in read_prompts()}) < 800
    write_prompts(chosen, tmp_path / "prompts.jsonl")
    assert read_prompts(path=tmp_path / "prompts.jsonl") == chosen


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no prompts in .*none\.jsonl"):
        read_prompts(path=tmp_path / "none.jsonl")
    strange = FILE.read_text(encoding="utf-8").replace('"thing":"1f6d1"', '"thing":"1ffff"')
    (tmp_path / "strange.jsonl").write_text(strange, encoding="utf-8")
    with pytest.raises(UserError, match="'1ffff', which is not in the atlas"):
        read_prompts(path=tmp_path / "strange.jsonl")
    with pytest.raises(ValueError, match="300 things are fewer than the 400"):
        choose_prompts(things=300)
