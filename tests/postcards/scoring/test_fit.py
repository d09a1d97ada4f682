"""The scorer's training: its targets, its batches, and that it learns one of them."""

import numpy as np
import pytest
import torch

from ldm import postcards as world
from ldm.postcards.scoring.agreement import names, truth
from ldm.postcards.scoring.fit import ScorerTask, density, scenes_from
from ldm.postcards.scoring.scorer import Scorer, ScorerConfig

NAMES = names()
SMALL = ScorerConfig(
    NAMES.kinds, NAMES.colours, NAMES.places, NAMES.times, NAMES.weathers, (8, 16, 32, 32), 32
)


def make_task(**loss):
    torch.manual_seed(0)
    return ScorerTask(Scorer(SMALL), held_out=8, loss=loss)


def test_density_sums_to_the_count_and_lies_where_things_are():
    scenes = scenes_from(range(64), "test density")
    labels, cells = truth(scenes), (np.arange(16) + 0.5) / 16
    maps = np.stack([density(scene) for scene in scenes])
    np.testing.assert_allclose(maps.sum((2, 3)), labels.count, rtol=1e-5)
    there = labels.count > 0
    x = ((maps.sum(2) * cells).sum(-1) / maps.sum((2, 3)).clip(1e-9))[there]
    y = ((maps.sum(3) * cells).sum(-1) / maps.sum((2, 3)).clip(1e-9))[there]
    np.testing.assert_allclose(x, labels.x[there], atol=0.03)
    np.testing.assert_allclose(y, labels.y[there], atol=0.03)


def test_every_fourth_scene_is_of_a_held_out_pair():
    unseen = [
        any(world.is_held_out(group.kind, group.colour) for group in scene.groups)
        for scene in scenes_from(range(40), "test scenes")
    ]
    assert unseen == [False, False, False, True] * 10


def test_a_batch_depends_on_its_generator_alone():
    task = make_task()
    a, b, c = (task.batch(torch.Generator().manual_seed(seed), 4) for seed in (1, 1, 2))
    assert all(torch.equal(torch.nan_to_num(a[name]), torch.nan_to_num(b[name])) for name in a)
    assert not torch.equal(a["images"], c["images"])
    assert a["images"].shape == (4, 3, 128, 128)


def test_held_out_scenes_are_not_those_of_any_batch():
    held_out = {scene.seed for scene in make_task().scenes}
    assert held_out.isdisjoint(scene.seed for scene in scenes_from(range(1000), "scorer"))


def test_melted_pictures_hold_nothing_to_name():
    batch = make_task(melted=1.0).batch(torch.Generator().manual_seed(0), 6)
    assert batch["count"].sum() == 0
    assert batch["density"].sum() == 0
    loss, parts = make_task()(batch)
    assert torch.isfinite(loss)
    assert parts["colour"] == parts["attention"] == parts["centre"] == 0


def test_each_part_of_the_loss_is_weighed():
    batch = make_task().batch(torch.Generator().manual_seed(0), 4)
    loss, parts = make_task(density=0.0, centre=0.0)(batch)
    rest = sum(value for name, value in parts.items() if name not in ("density", "centre"))
    assert loss.item() == pytest.approx(rest.item(), rel=1e-6)


def test_it_learns_a_batch_by_heart():
    task = make_task(melted=0.0)
    batch = task.batch(torch.Generator().manual_seed(0), 4)
    optimiser = torch.optim.AdamW(task.parameters(), lr=5e-3)
    first = task(batch)[1]
    for _ in range(40):
        loss, parts = task(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Density and attention have targets that are not 0 or 1, so their losses have a floor.
    assert all(
        parts[name] < 0.5 * first[name] for name in ("count", "colour", "centre", "place", "time", "weather")
    )
    assert parts["density"] < first["density"]
    assert parts["attention"] < first["attention"]
