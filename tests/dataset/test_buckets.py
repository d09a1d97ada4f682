"""Buckets, crops and batches, against closed forms and what diffusers' training script does."""

import math
import pickle
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ldm.dataset.buckets import (
    Batches,
    Variation,
    apply_crop,
    make_buckets,
    make_crop,
    nearest_bucket,
    shuffle_tags,
)
from ldm.dataset.findings import Example
from ldm.errors import UserError

BUCKETS = make_buckets(64, unit=8)


def example(name, size=(64, 64), caption="a, b, c, d", repeats=1):
    return Example(Path(f"{name}.png"), caption, size, f"{name:0>64}", repeats)


def folder(sizes=((64, 64),) * 9 + ((90, 60),) * 5 + ((30, 50),), repeats=1):
    return [example(i, size, repeats=repeats) for i, size in enumerate(sizes)]


# --- sizes -----------------------------------------------------------------------------------------------


def test_buckets_of_1024_are_those_of_sdxl():
    # Podell et al. 2023, appendix I, between ratios 0.57 and 1.75.
    listed = [(768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)]
    listed += [(1088, 960), (1152, 896), (1216, 832), (1344, 768)]
    assert list(make_buckets(1024)) == listed


@pytest.mark.parametrize(("resolution", "unit"), [(512, 64), (1024, 64), (768, 8), (128, 8), (64, 64)])
def test_buckets_are_about_resolution_squared_in_units(resolution, unit):
    buckets = make_buckets(resolution, unit=unit)
    assert (resolution, resolution) in buckets
    for height, width in buckets:
        assert height % unit == width % unit == 0
        assert resolution**2 - unit * max(height, width) < height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width)
        assert (width, height) in buckets


def test_faulty_buckets_are_told():
    with pytest.raises(UserError, match="resolution 500 is not a multiple of 8: take 496"):
        make_buckets(500)
    with pytest.raises(UserError, match="resolution 32 is not a multiple of 64: take 64"):
        make_buckets(32, unit=64)
    assert [make_buckets(side)[0] for side in (1024, 512, 128)] == [(768, 1344), (384, 640), (96, 160)]
    with pytest.raises(UserError, match="max_ratio"):
        make_buckets(512, max_ratio=0.5)


def test_a_picture_goes_to_the_nearest_ratio():
    buckets = make_buckets(512)
    assert nearest_bucket((3000, 2000), buckets) == (640, 384)
    assert nearest_bucket((100, 5000), buckets) == (384, 640)
    # 1.30 and 1 / 1.30 are as far from the square, which only logarithms see.
    edge = math.sqrt(576 / 448)
    for factor, bucket in ((0.99, (512, 512)), (1.01, (576, 448))):
        assert nearest_bucket((round(10000 * edge * factor), 10000), buckets) == bucket
        assert nearest_bucket((10000, round(10000 * edge * factor)), buckets) == bucket[::-1]


# --- crops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [(333, 500), (500, 333), (64, 64), (11, 7), (640, 80), (1, 900)])
def test_a_crop_covers_its_bucket_undistorted(original):
    for at in (None, (0.0, 0.0), (0.5, 0.7), (0.999999, 0.999999)):
        crop = make_crop(original, nearest_bucket(original, BUCKETS), at)
        scale = max(crop.size[i] / original[i] for i in (0, 1))
        for i, start in enumerate((crop.top, crop.left)):
            assert abs(crop.resized[i] - scale * original[i]) <= 0.5
            assert 0 <= start <= crop.resized[i] - crop.size[i]
        if at == (0.999999, 0.999999):
            assert (crop.top, crop.left) == tuple(crop.resized[i] - crop.size[i] for i in (0, 1))


def photo(height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("original", [(160, 96), (97, 211), (40, 51)])
def test_centre_crop_and_time_ids_equal_those_of_the_diffusers_script(original, flip):
    """train_text_to_image_sdxl.py, with Pillow alone: resize the shorter side, mirror, cut in the middle."""
    image, (h, w) = photo(*original), original
    short = 64 / min(h, w)
    whole = image.resize((max(64, round(w * short)), max(64, round(h * short))), Image.Resampling.LANCZOS)
    whole = ImageOps.mirror(whole) if flip else whole
    top, left = round((whole.height - 64) / 2), round((whole.width - 64) / 2)
    theirs = np.asarray(whole.crop((left, top, left + 64, top + 64)), np.float32) / 127.5 - 1

    crop = make_crop(original, (64, 64), flipped=flip)
    ours = apply_crop(image, crop)
    assert crop.time_ids == (h, w, top, left, 64, 64)
    assert ours.shape == (3, 64, 64)
    levels = (ours - torch.from_numpy(theirs).permute(2, 0, 1)).abs() * 255 / 2
    assert levels.max() < 2.1  # Pillow rounds between its two passes, whose order may differ
    assert levels.mean() < 0.5


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("original", [(240, 120), (120, 240), (100, 100), (50, 40)])
@pytest.mark.parametrize("at", [None, (0.0, 0.0), (0.9, 0.2)])
def test_colours_tell_where_each_pixel_came_from(original, flipped, at):
    """A picture whose red is x and green is y: column j of a crop shows (j + left + 1/2) / resized width."""
    h, w = original
    x, y = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
    red, green = np.broadcast_to(x, (h, w)), np.broadcast_to(y[:, None], (h, w))
    image = Image.fromarray((np.stack([red, green, 0 * red], -1) * 255).round().astype(np.uint8))
    crop = make_crop(original, nearest_bucket(original, BUCKETS), at, flipped)
    shown = (apply_crop(image, crop) + 1) / 2
    across = (torch.arange(crop.size[1]) + crop.left + 0.5) / crop.resized[1]
    down = (torch.arange(crop.size[0]) + crop.top + 0.5) / crop.resized[0]
    across = 1 - across if flipped else across
    inner = (slice(3, -3), slice(3, -3))  # at the picture's own edge an interpolation has one side only
    assert (shown[0][inner] - across[None, 3:-3]).abs().max() < 2.5 / 255
    assert (shown[1][inner] - down[3:-3, None]).abs().max() < 2.5 / 255
    assert shown[2].abs().max() == 0


def test_shrinking_is_antialiased():
    """Columns in black and white, 8 to a pixel, are an even grey; taking single pixels would show stripes."""
    stripes = Image.fromarray(np.tile(np.uint8([0, 255] * 4), (512, 64)))
    shown = apply_crop(stripes.convert("RGB"), make_crop((512, 512), (64, 64)))
    assert shown[:, :, 4:-4].abs().max() < 0.05


def test_a_picture_that_has_changed_is_told():
    with pytest.raises(UserError, match="20 x 10 pixels, not 10 x 20 as when it was examined"):
        apply_crop(Image.new("RGB", (20, 10)), make_crop((20, 10), (64, 64)))


# --- batches ---------------------------------------------------------------------------------------------


def names(rows):
    return [row.example.path.stem for row in rows]


def test_an_epoch_shows_every_picture_as_often_as_it_says():
    examples = [*folder()[:-1], example("often", (64, 64), repeats=3)]
    batches = Batches(examples, [BUCKETS], 4, seed=1)  # 12 square ones and 5 upright ones
    assert (len(batches), batches.filled) == (5, 3)
    for epoch in range(6):
        rows = [batches.at(epoch * 5 + i) for i in range(5)]
        assert all(len(batch) == 4 and len({row.crop.size for row in batch}) == 1 for batch in rows)
        shown = Counter(name for batch in rows for name in names(batch))
        square = {str(i): 1 for i in range(9)} | {"often": 3}
        assert {name: shown[name] for name in square} == square
        upright = [shown[str(i)] for i in range(9, 14)]
        assert sorted(upright) == [1, 1, 2, 2, 2]


def test_what_fills_a_batch_are_others_first():
    examples = [example(i) for i in range(6)]
    batches = Batches(examples, [BUCKETS], 4, seed=0)
    assert all(len(set(names(batches.at(k)))) == 4 for k in range(20))
    alone = Batches([example("one"), example("two")], [BUCKETS], 5, seed=0)
    assert Counter(names(alone.at(0))).most_common()[0][1] == 3


def test_processes_share_out_the_batches_of_one():
    batches = Batches(folder(), [BUCKETS], 2, seed=5)
    for world_size in (2, 3):
        for step in range(2 * len(batches)):
            for rank in range(world_size):
                assert batches.at(step, rank, world_size) == batches.at(step * world_size + rank)
    full = Batches([example(i) for i in range(16)], [BUCKETS], 2, seed=5)
    epoch = [name for step in range(4) for rank in (0, 1) for name in names(full.at(step, rank, 2))]
    assert sorted(epoch, key=int) == [str(i) for i in range(16)]


VARIED = Variation(True, True, 0.3, True, 1)


def test_batches_depend_on_nothing_but_their_number():
    def make(seed=7):
        return Batches(folder(), [BUCKETS], 4, seed, VARIED)

    inorder = [make().at(k) for k in range(30)]
    one = pickle.loads(pickle.dumps(make()))
    order = list(range(30))
    random.Random(0).shuffle(order)
    random.seed(3), torch.manual_seed(3)
    assert {k: one.at(k) for k in order} == dict(enumerate(inorder))
    assert inorder != [make(8).at(k) for k in range(30)]
    assert inorder[:5] != inorder[5:10], "epochs differ"
    assert names(inorder[0]) == ["11", "9", "12", "10"], "on every machine and version"


def test_any_step_is_at_hand_at_once():
    batches = Batches([example(i) for i in range(20_000)], [BUCKETS], 4, seed=0)
    began = time.process_time()
    assert len(batches.at(10**6 + 1)) == 4
    assert time.process_time() - began < 0.5


def test_variations_leave_each_other_alone():
    def rows(**variation):
        batches = Batches(folder(), [BUCKETS], 4, 3, Variation(**variation))
        return [row for k in range(40) for row in batches.at(k)]

    plain, everything = rows(), rows(random_crop=True, random_flip=True, caption_dropout=0.25)
    assert [row.example for row in plain] == [row.example for row in everything]
    assert all(row.crop == make_crop(row.example.size, row.crop.size) for row in plain)
    assert [row.crop.flipped for row in rows(random_flip=True)] == [row.crop.flipped for row in everything]
    dropped = [row.caption for row in rows(caption_dropout=0.25)]
    assert dropped == [row.caption for row in everything]
    assert 0.15 < dropped.count("") / 160 < 0.35
    assert 0.4 < sum(row.crop.flipped for row in everything) / 160 < 0.6
    assert {row.caption for row in rows(caption_dropout=1.0, shuffle_tags=True)} == {""}
    tops = [row.crop.top for row in everything if row.example.size == (90, 60)]
    room = make_crop((90, 60), nearest_bucket((90, 60), BUCKETS), (0.999, 0)).top
    assert set(tops) == set(range(room + 1)), "every place, the ends too"


def test_tags_are_shuffled_after_those_kept():
    orders = Counter(shuffle_tags("x , a,b, ,c", random.Random(i), keep=1) for i in range(600))
    assert len(orders) == 6
    assert all(tags.startswith("x, ") for tags in orders)
    assert min(orders.values()) > 60, "each order as often as another"
    batches = Batches(folder(), [BUCKETS], 4, 3, Variation(shuffle_tags=True, keep_tags=2))
    assert {row.caption for k in range(10) for row in batches.at(k)} == {"a, b, c, d", "a, b, d, c"}


def test_all_crops_are_listed_bucket_by_bucket():
    batches = Batches(folder(repeats=2), [BUCKETS], 4, 0, Variation(random_flip=True))
    listed = list(batches.crops())
    assert len(listed) == len(set(listed)) == 2 * 15
    seen = {(row.example, row.crop) for k in range(300) for row in batches.at(k)}
    assert seen == set(listed)
    with pytest.raises(ValueError, match="random crops"):
        list(Batches(folder(), [BUCKETS], 4, 0, Variation(random_crop=True)).crops())


def test_resolutions_that_have_a_size_in_common_show_it_for_each():
    assert (768, 1344) in {*make_buckets(1016)} & {*make_buckets(1024)}
    batches = Batches([example("wide", (768, 1344))], [make_buckets(1016), make_buckets(1024)], 1, 0)
    assert [batches.at(k)[0].crop.size for k in range(2)] == [(768, 1344)] * 2
    assert (len(batches), batches.filled, len(list(batches.crops()))) == (2, 0, 1)


def test_nothing_to_show_is_told():
    with pytest.raises(UserError, match="0 pictures in batches of 4"):
        Batches([], [BUCKETS], 4, 0)
