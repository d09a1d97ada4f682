"""The detector: where it looks, what it makes of what it finds, its files. What it learns is measured."""

import random
from dataclasses import fields

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.postcards.scoring.detector import CUT, Detector, DetectorConfig, Located, Named, cuts, peaks
from ldm.postcards.scoring.detector_fit import locations
from ldm.postcards.scoring.names import sprite_names
from ldm.postcards.sprites.scene import make_world, sample_scene

TINY = DetectorConfig(
    ("cat", "car", "sun"),
    ("red", "blue"),
    ("sea", "city"),
    ("day", "night"),
    ("clear", "rain"),
    (8, 8, 16, 16),
    (8, 8, 16, 16),
    24,
    styles=("flat", "3d"),
)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    made = Detector(TINY).eval()
    for p in made.parameters():  # no zero-initialised branch hides from the tests
        p.data.add_(0.05 * torch.randn_like(p))
    torch.nn.init.constant_(made.heat.bias, 1.0)  # it sees things
    return made


def pictures(n, size=128):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def test_full_size_fits_its_budget():
    names = sprite_names(make_world(400))
    assert sum(p.numel() for p in Detector(DetectorConfig(**vars(names))).parameters()) <= 2.1e6


def test_peaks_are_the_boxes_that_the_map_was_made_of():
    world, rng = make_world(100), random.Random(3)
    scenes = [sample_scene(world, rng) for _ in range(40)]
    maps = [locations(scene) for scene in scenes]
    heat = torch.from_numpy(np.stack([heat for heat, _ in maps]))
    sides = torch.from_numpy(np.stack([sides for _, sides in maps]))
    certain, boxes = peaks(heat, sides)
    for i, scene in enumerate(scenes):
        found = sorted(boxes[i][certain[i] == 1].tolist())
        true = sorted(
            [box.left, box.top, box.right, box.bottom] for group in scene.groups for box in group.boxes
        )
        np.testing.assert_allclose(found, true, atol=1e-5)


def test_a_cut_is_the_picture_around_the_box():
    """Of a picture that rises evenly from left to right and from top to bottom, a cut does so too."""
    middles = (torch.arange(128) + 0.5) / 128
    rising = torch.stack([middles.expand(128, 128), middles[:, None].expand(128, 128)])
    images = torch.stack([torch.zeros(3, 128, 128), torch.cat([rising, rising[:1]])])
    cut = cuts(images, torch.tensor([[0.3, 0.4, 0.5, 0.8], [0.3, 0.4, 0.5, 0.8]]), torch.tensor([1, 0]))
    assert cut.shape == (2, 3, CUT, CUT)
    side = 1.15 * 0.4
    steps = (torch.arange(CUT) + 0.5) / CUT - 0.5
    torch.testing.assert_close(cut[0, 0], (0.4 + side * steps).expand(CUT, CUT), atol=1e-5, rtol=0)
    torch.testing.assert_close(cut[0, 1], (0.6 + side * steps)[:, None].expand(CUT, CUT), atol=1e-5, rtol=0)
    assert (cut[1] == 0).all()


class Seeing(Detector):
    """Finds what it is told: of each picture, where things are, how surely, and what they are."""

    def __init__(self, found):
        super().__init__(TINY)
        self.found = found

    def locate(self, images):
        heat, sides = torch.full((len(images), 16, 16), -9.0), torch.full((len(images), 4, 16, 16), 0.1)
        for i, things in enumerate(self.found):
            for (row, column), certain, *_ in things:
                heat[i, row, column] = torch.logit(torch.tensor(certain))
        zero = torch.zeros(len(images), 2)
        return Located(heat, sides, zero, zero, zero, zero)

    def name(self, cut):
        # What is surest comes first, as `peaks` has it.
        surest = [sorted(some, key=lambda one: -one[1]) for some in self.found]
        things = [one for some in surest for one in some if one[1] > 0.35]
        assert len(cut) == len(things)
        kind, style, colour = (
            20.0 * torch.nn.functional.one_hot(torch.tensor([one[part] for one in things]), n).float()
            for part, n in ((2, 4), (3, 2), (4, 2))
        )
        return Named(kind, style, colour, torch.ones(len(cut), 24))


def test_what_is_found_is_read():
    cat, car, sun, nothing, flat, solid, red, blue = 0, 1, 2, 3, 0, 1, 0, 1
    seeing = Seeing(
        [
            [((3, 2), 0.9, cat, flat, red), ((10, 12), 0.95, car, solid, blue)],
            [((8, 1), 0.9, sun, flat, red), ((8, 8), 0.8, sun, flat, red), ((8, 14), 0.7, sun, flat, blue)],
            [((8, 8), 0.9, nothing, flat, red)],
            [((8, 8), 0.2, cat, flat, red)],
        ]
    )
    read = seeing.read(pictures(4))
    np.testing.assert_array_equal(read.count, [[1, 1, 0], [0, 0, 3], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(read.presence.argmax(1)[:2], [car, sun])
    np.testing.assert_allclose(read.presence[0], [0.9, 0.95, 0], atol=1e-4)
    assert read.presence[2:].max() < 1e-4
    assert (read.colour[0, :2].tolist(), read.style[0, :2].tolist()) == ([red, blue], [flat, solid])
    assert (read.colour[1, sun], read.style[1, sun]) == (red, flat)  # most of them
    np.testing.assert_allclose(read.x[0, :2], [2.5 / 16, 12.5 / 16], atol=1e-4)
    np.testing.assert_allclose(read.y[0, :2], [3.5 / 16, 10.5 / 16], atol=1e-4)
    middle = (0.9 * 1.5 + 0.8 * 8.5 + 0.7 * 14.5) / 2.4 / 16  # as sure as it is of each
    assert read.x[1, sun] == pytest.approx(middle, abs=1e-4)


def test_reading_does_not_depend_on_the_batch(detector):
    images = pictures(5)
    whole, parts = detector.read(images), detector.read(images, batch_size=2)
    assert (whole.presence.max(1) > 0).all()
    for field in fields(whole):
        a, b = getattr(whole, field.name), getattr(parts, field.name)
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=field.name)


def test_a_saved_one_reads_the_same(detector, tmp_path):
    detector.half().float().save(tmp_path)
    again = Detector.load(tmp_path)
    assert again.config == TINY
    images = pictures(2)
    np.testing.assert_array_equal(again.read(images).presence, detector.read(images).presence)
    (tmp_path / "scorer.json").write_text('{"kinds": []}', encoding="utf-8")
    with pytest.raises(UserError, match="does not describe a scorer"):
        Detector.load(tmp_path)
