"""Guidance compared: on pipelines whose fidelity and diversity are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.evaluate.report import rate
from ldm.postcards.comparisons import conditions
from ldm.postcards.comparisons.conditions import CLASSIFIER, FREE, Point, arguments, plot, renders, spread
from ldm.postcards.scoring.scorer import Reading
from ldm.postcards.vocabulary import KINDS


class Truth:
    """A scorer of renders and of grey pictures: it knows the first's kind, and sees none in the others."""

    config = SimpleNamespace(kinds=KINDS[:3])

    def __init__(self, each):
        self.known = {
            picture.tobytes(): k
            for k, kind in enumerate(self.config.kinds)
            for picture in renders(kind, each)
        }

    def read(self, images):
        count = np.zeros((len(images), 3), np.int64)
        for i, picture in enumerate(images):
            if picture.tobytes() in self.known:
                count[i, self.known[picture.tobytes()]] = 1
        features = np.stack([images.mean((1, 2))[:, c] for c in range(3)], 1)
        return Reading(**dict.fromkeys(Reading.__dataclass_fields__) | {"count": count, "features": features})


def pipe_of(draw):
    """A pipeline that draws what `draw(kind, index)` says, for what it is asked for."""

    def call(prompts, seed, **asked):
        kind = asked.get("classifier_class") or prompts[0].removeprefix("a ")
        return SimpleNamespace(images=[Image.fromarray(draw(kind, each % 1000)) for each in seed])

    return call


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(conditions, "SCALES", {CLASSIFIER: (0, 4), FREE: (1,)})


def test_renders_of_the_class_are_perfect(small):
    drawn = {kind: renders(kind, 4) for kind in KINDS[:3]}
    pipe = pipe_of(lambda kind, i: drawn[kind][i])
    told = []
    curves = conditions.measure_guidance(pipe, Truth(4), 4, lambda *found: told.append(found))
    assert [(way, point.scale) for way, point in told] == [(CLASSIFIER, 0), (CLASSIFIER, 4), (FREE, 1)]
    for point in (point for points in curves.values() for point in points):
        assert (point.share.right, point.share.n) == (12, 12)
        assert point.frechet == pytest.approx(0, abs=1e-6)
        assert point.diversity == pytest.approx(1)


def test_one_grey_picture_over_and_over_has_neither(small):
    pipe = pipe_of(lambda kind, i: np.full((128, 128, 3), 128, np.uint8))
    curves = conditions.measure_guidance(pipe, Truth(4), 4, lambda *found: None)
    point = curves[FREE][0]
    assert (point.share.right, point.share.n, point.diversity) == (0, 12, 0)
    assert point.frechet > 10


def test_a_kind_s_renders_are_its_own_and_the_same_each_time():
    assert np.array_equal(renders("duck", 2), renders("duck", 3)[:2])
    assert {scene.groups[0].kind for scene in conditions._scenes("duck", 5)} == {"duck"}


def test_the_embedded_classifier_names_what_the_embedded_model_s_latents_show():
    pipe = ldm.load(device="cpu", dtype="fp32").with_classifier("postcard-classifier")
    assert pipe.classifier.network.config.classes == KINDS
    images = torch.from_numpy(np.concatenate([renders(kind, 2) for kind in KINDS]))
    x0 = pipe.encode(images.permute(0, 3, 1, 2) / 255).mean
    x = x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    named = pipe.classifier.network(x, torch.tensor(1.0)).argmax(1).reshape(-1, 2)
    assert int((named == torch.arange(len(KINDS))[:, None]).sum()) >= 26  # of 28


def test_spread_is_the_mean_distance_of_pairs():
    groups = [np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0], [1.0], [2.0]])]
    assert spread(groups) == pytest.approx((5 + 4 / 3) / 2)


def test_each_way_asks_for_what_it_is():
    assert arguments(FREE, "duck", 2.5) == {"prompt": "a duck", "guidance_scale": 2.5}
    guided = {"guidance_scale": 1.0, "classifier_class": "duck", "classifier_scale": 4}
    assert arguments(CLASSIFIER, "duck", 4) == {"prompt": "", **guided}


def test_a_plot_has_its_dots_where_they_belong():
    """A quarter of the way between the lines of the grid at 0.6 and 0.65, and half-way from 0.4 to 0.6."""
    point = Point(scale=2, share=rate([True, False]), frechet=3.0, diversity=0.6125)
    drawn = plot({FREE: [point]}, lambda point: point.share.share, "share", 0.2)
    x = round(conditions.LEFT + (conditions.RIGHT - conditions.LEFT) / 4)
    y = (conditions.TOP + conditions.BOTTOM) // 2
    assert drawn.getpixel((x, y)) == (0x1C, 0x7E, 0xD6)
    assert drawn.getpixel((x - 30, y + 30)) == (255, 255, 255)
