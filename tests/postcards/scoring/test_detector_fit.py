"""The detector's training: its targets, its batches, and that it learns one of them."""

import math

import numpy as np
import pytest
import torch

from ldm.postcards.scoring.detector import Detector, DetectorConfig
from ldm.postcards.scoring.detector_fit import DetectorTask, heat_loss, things_in
from ldm.postcards.scoring.names import kind_of, sprite_names, style_of
from ldm.postcards.sprites.scene import Scene, make_world

WORLD = make_world(40)
NAMES = sprite_names(WORLD)
SMALL = DetectorConfig(**vars(NAMES), widths=(8, 16, 24, 24), look=(8, 16, 24, 32), hidden=32)


def make_task(**loss):
    torch.manual_seed(0)
    return DetectorTask(Detector(SMALL), WORLD, held_out=8, loss=loss)


def test_a_batch_depends_on_its_generator_alone():
    task = make_task()
    a, b, c = (task.batch(torch.Generator().manual_seed(seed), 4) for seed in (1, 1, 2))
    assert all(torch.equal(torch.nan_to_num(a[name]), torch.nan_to_num(b[name])) for name in a)
    assert not torch.equal(a["images"], c["images"])
    assert a["images"].shape == (4, 3, 128, 128)


def test_what_is_asked_of_a_cut_is_what_stands_there():
    scenes = make_task().scenes
    batch = make_task(melted=0.0).batch(torch.Generator().manual_seed(3), 8)
    assert len(batch["rows"]) == len(batch["boxes"]) == len(batch["kind"])
    assert batch["heat"].eq(1).sum() == len(batch["rows"])
    for scene in scenes:
        things = things_in(scene, NAMES)
        assert [NAMES.kinds[kind] for _, kind, *_ in things] == [
            kind_of(group) for group in scene.groups for _ in group.boxes
        ]
        assert {NAMES.styles[style] for _, _, style, _ in things} <= {style_of(scene)}
        colours = [group.colour for group in scene.groups for _ in group.boxes]
        assert [NAMES.colours[k] if k >= 0 else None for *_, k in things] == colours


def test_a_quarter_of_scenes_is_of_what_the_generator_never_sees_and_some_are_postcards():
    scenes = [make_task()._scene(f"test {k}", 0) for k in range(60)]
    assert 0 < sum(not isinstance(scene, Scene) for scene in scenes) < 20


def test_melted_pictures_hold_nothing_to_name():
    task = make_task(melted=1.0)
    batch = task.batch(torch.Generator().manual_seed(0), 6)
    assert batch["heat"].sum() == 0
    assert (batch["kind"] == len(NAMES.kinds)).all()
    loss, parts = task(batch)
    assert torch.isfinite(loss)
    assert parts["style"] == parts["colour"] == parts["sides"] == 0


def test_the_focal_loss_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    target = torch.rand(2, 4, 4, generator=generator, dtype=torch.float64)
    target[0, 1, 2] = target[1, 0, 3] = 1
    expected = 0.0
    for z, y in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        expected -= (1 - p) ** 2 * math.log(p) if y == 1 else (1 - y) ** 4 * p**2 * math.log(1 - p)
    assert heat_loss(logits, target).item() == pytest.approx(expected / 2, rel=1e-12)


def test_it_learns_a_batch_by_heart_and_reads_it():
    task = make_task(melted=0.0, located=1.0)
    batch = task.batch(torch.Generator().manual_seed(0), 4)
    optimiser = torch.optim.AdamW(task.parameters(), lr=5e-3)
    first = task(batch)[1]
    for _ in range(60):
        loss, parts = task(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(parts[name] < 0.5 * first[name] for name in parts)
    pixels = ((batch["images"].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    read = task.detector.eval().read(pixels)
    true = np.zeros_like(read.count)
    for row, kind in zip(batch["rows"].tolist(), batch["kind"].tolist(), strict=True):
        true[row, kind] += 1
    np.testing.assert_array_equal(read.count, true)
