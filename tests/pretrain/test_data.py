"""Training pictures: rendered postcards and folders of images."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import postcards
from ldm.errors import UserError
from ldm.postcards import wording
from ldm.postcards.captions import split
from ldm.pretrain.data import load_pictures
from ldm.pretrain.recipe import DataSection


def section(tmp_path, **values) -> DataSection:
    return DataSection(**({"cache": tmp_path / "cache", "size": 32, "held_out": 2, "captions": 3} | values))


def test_postcards_are_the_world_s_own(tmp_path):
    train, held_out = load_pictures(section(tmp_path, count=6))
    assert (len(train), len(held_out)) == (6, 2)
    assert train.images.shape == (6, 32, 32, 3)
    rng = random.Random("1-4")
    scene = postcards.sample_scene(rng)
    assert np.array_equal(train.images[4], postcards.render(scene, 32))
    assert train.captions[4] == [postcards.caption(scene, rng) for _ in range(3)]
    cells = postcards.object_mask(scene, 32).reshape(4, 8, 4, 8).mean((1, 3))
    assert np.abs(train.masks[4] / 255 - cells).max() < 1 / 255
    named = postcards.encode_labels(scene)
    assert np.array_equal(train.labels[4][: len(postcards.KINDS)], (named.count > 0).astype(np.uint8))
    assert train.labels[4].sum() == 2 * (named.count > 0).sum() + (named.count > 1).sum() + 3


def test_things_are_where_their_boxes_are_and_compositions_are_those_asked_for(tmp_path):
    mix = {"beside": 1.0}
    train, _ = load_pictures(section(tmp_path, count=6, size=128, compositions=mix))
    plain, _ = load_pictures(section(tmp_path, count=6, size=128))
    assert not np.array_equal(train.images, plain.images)  # kept apart in the cache
    for number in range(6):
        scene = postcards.sample_scene(random.Random(f"1-{number}"), compositions=mix)
        first, second = scene.groups
        found = train.things[number]
        assert set(np.unique(found)) <= {0} | {_number(first), _number(second)}
        for group in scene.groups:
            column = int(group.boxes[0].x * 8)
            row = int(group.boxes[0].y * 8)
            assert found[row, column] == _number(group)


def _number(group):
    return (
        1 + postcards.KINDS.index(group.kind) * len(postcards.COLOURS) + postcards.COLOURS.index(group.colour)
    )


def test_shades_change_the_colours_of_some_postcards_and_nothing_else(tmp_path):
    plain, _ = load_pictures(section(tmp_path, count=40))
    some, _ = load_pictures(section(tmp_path, count=40, shades=0.5))
    every, _ = load_pictures(section(tmp_path, count=40, shades=1))
    for train in (some, every):
        assert train.captions == plain.captions
        for name in ("labels", "masks", "things"):
            assert np.array_equal(getattr(train, name), getattr(plain, name))
    changed = [
        [bool((a != b).any()) for a, b in zip(x.images, plain.images, strict=True)] for x in (some, every)
    ]
    assert 10 < sum(changed[0]) < 30
    things = plain.masks.any((1, 2))
    assert (np.array(changed[1]) <= things).all()  # nothing to paint in an empty landscape
    assert sum(changed[1]) > 0.9 * things.sum()  # a shade can be all but the colour itself
    number = changed[0].index(True)
    assert np.array_equal(some.images[number], every.images[number])
    differs = (some.images[number] != plain.images[number]).any(-1).reshape(4, 8, 4, 8).any((1, 3))
    assert (differs <= (plain.masks[number] > 0)).all()


def test_repainted_postcards_differ_in_their_things_colours(tmp_path):
    plain, _ = load_pictures(section(tmp_path, count=40))
    assert plain.repainted is None
    train, held_out = load_pictures(section(tmp_path, count=40), repainted=True)
    assert np.array_equal(train.images, plain.images)
    assert train.captions == plain.captions
    assert held_out.repainted.shape == held_out.images.shape
    change = np.abs(train.repainted.astype(int) - train.images).max(-1).reshape(40, 4, 8, 4, 8).max((2, 4))
    seen = train.masks > 0  # a thing that covers less than half of a pixel is not in the mask
    assert change[~seen].mean() < 0.05 * change[seen].mean()
    assert np.array_equal(change.max((1, 2)) > 40, train.masks.any((1, 2)))  # but nothing in a landscape
    scenes = [postcards.sample_scene(random.Random(f"1-{number}")) for number in range(40)]
    for scene, captions, told in zip(scenes, train.captions, train.names_colours, strict=True):
        assert told.tolist() == [postcards.names_colours(scene, each) for each in captions]
    other, _ = load_pictures(section(tmp_path, count=40, reworded=1), repainted=True)
    assert np.array_equal(other.repainted, train.repainted)


def test_captions_are_reworded_as_often_as_asked(tmp_path):
    new = set(wording.words())

    def share(reworded):
        train, _ = load_pictures(section(tmp_path, count=300, captions=4, reworded=reworded))
        told = [caption for captions in train.captions for caption in captions]
        return sum(bool(new & set(split(caption))) for caption in told) / len(told)

    assert share(0.0) == 0
    assert share(0.4) == pytest.approx(0.4 * share(1.0), abs=0.05)
    assert share(1.0) > 0.5


def test_postcards_are_rendered_once(tmp_path):
    first, _ = load_pictures(section(tmp_path, count=6))
    file = next((tmp_path / "cache").glob("*/images.npy"))
    changed = file.stat().st_mtime_ns
    second, _ = load_pictures(section(tmp_path, count=6))
    assert file.stat().st_mtime_ns == changed
    assert np.array_equal(first.images, second.images)


def test_pixels_become_minus_one_to_one(tmp_path):
    train, _ = load_pictures(section(tmp_path, count=6))
    x = train.tensors(torch.tensor([3, 0]))
    assert x.shape == (2, 3, 32, 32)
    expected = torch.from_numpy(train.images[[3, 0]].astype(np.float64)).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(x.double(), expected, atol=1e-6)


def folder_with(tmp_path, count=5):
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (60 + i, 40), (40 * i, 0, 0)).save(folder / "deep" / f"{i}.png")
    return folder


def test_a_folder_with_captions_beside_and_listed(tmp_path):
    folder = folder_with(tmp_path)
    (folder / "deep" / "1.txt").write_text("beside\n")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "deep/2.png", "text": "listed"}) + "\n")
    train, held_out = load_pictures(section(tmp_path, folder=folder))
    assert [each[0] for each in train.captions + held_out.captions] == ["", "beside", "listed", "", ""]
    assert train.images.shape == (3, 32, 32, 3)
    assert train.images[2, 16, 16].tolist() == [80, 0, 0]
    assert train.labels is None


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.png"\n'), r"metadata\.jsonl: row 1"),
        (lambda f: [p.unlink() for p in f.glob("deep/*")], "no picture to train on"),
        (lambda f: [p.unlink() for p in f.glob("deep/[1-4]*")], "1 pictures found, but 2 are held out"),
    ],
)
def test_a_folder_s_faults_are_named(tmp_path, damage, named):
    folder = folder_with(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=named):
        load_pictures(section(tmp_path, folder=folder))


def test_a_picture_that_cannot_be_read_is_left_out_and_others_are_upright(tmp_path):
    folder = folder_with(tmp_path)
    (folder / "deep" / "0.png").write_bytes(b"\x89PNG broken")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = Image.new("RGB", (60, 40))
    turned.paste((250, 0, 0), (0, 0, 30, 40))
    turned.save(folder / "deep" / "1.png", exif=exif)
    train, held_out = load_pictures(section(tmp_path, folder=folder))
    assert len(train) + len(held_out) == 4
    assert train.images[0, 2, 16].tolist() == [250, 0, 0]  # the left half is the upper one
    assert train.images[0, 30, 16].tolist() == [0, 0, 0]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_pictures(section(tmp_path, folder=tmp_path / "nowhere"))
