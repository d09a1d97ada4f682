"""The scorer's shapes, its determinism, its files. What it learns is measured by scripts/train_scorer.py."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.postcards.scoring.scorer import Scorer, ScorerConfig

TINY = ScorerConfig(
    ("cat", "car"),
    ("red", "blue", "green"),
    ("sea", "city"),
    ("day", "night"),
    ("clear", "rain"),
    (8, 8, 16, 16),
    16,
)


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    made = Scorer(TINY).eval()
    for p in made.parameters():  # no zero-initialised branch hides from the tests
        p.data.add_(0.05 * torch.randn_like(p))
    return made


def pictures(n, size=128):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def test_full_size_fits_its_budget():
    big = ScorerConfig(*(tuple(map(str, range(n))) for n in (14, 8, 7, 4, 4)))
    assert sum(p.numel() for p in Scorer(big).parameters()) <= 1.8e6


def test_shapes(scorer):
    scores = scorer(torch.zeros(5, 3, 128, 128))
    shapes = {f.name: tuple(getattr(scores, f.name).shape) for f in fields(scores)}
    assert shapes == {
        "count": (5, 2, 4),
        "attention": (5, 2, 16, 16),
        "density": (5, 2, 16, 16),
        "colour": (5, 2, 3),
        "centre": (5, 2, 2),
        "place": (5, 2),
        "time": (5, 2),
        "weather": (5, 2),
        "features": (5, 32),
    }
    assert (scores.centre > 0).all()
    assert (scores.centre < 1).all()


def test_reading_does_not_depend_on_the_batch(scorer):
    images = pictures(5)
    whole, split = scorer.read(images), scorer.read(images, batch_size=2)
    for field in fields(whole):
        np.testing.assert_allclose(
            getattr(whole, field.name), getattr(split, field.name), rtol=1e-4, atol=1e-5
        )


def test_centre_follows_the_attention(scorer):
    """With a query that sees only one cell, the centre is that cell's."""
    heads = scorer.objects
    tokens = torch.zeros(1, 16, 16, TINY.widths[2])
    tokens[0, 3, 12, 0] = 1
    heads.query.weight.data.zero_()[:, 0] = 100
    centre = heads(tokens)[4][0, 0]
    torch.testing.assert_close(centre, torch.tensor([12.5 / 16, 3.5 / 16]))


def test_density_adds_up_what_the_map_holds(scorer):
    """Lighting two cells gives twice one cell's sum: attention pooling alone could not count."""
    heads = scorer.objects
    heads.density.weight.data.zero_()[:, 0] = 40
    heads.density.bias.data.fill_(-20)
    tokens = torch.zeros(2, 16, 16, TINY.widths[2])
    tokens[:, 2, 2, 0] = 1
    tokens[1, 9, 13, 0] = 1
    total = heads(tokens)[2].sigmoid().sum((2, 3))
    torch.testing.assert_close(total[:, 0], torch.tensor([1.0, 2.0]))


def test_larger_pictures_are_read_like_their_small_selves(scorer):
    small = pictures(2, 16).repeat(8, 1).repeat(8, 2)
    large = small.repeat(2, 1).repeat(2, 2)
    a, b = scorer.read(small), scorer.read(large)
    np.testing.assert_allclose(a.presence, b.presence, atol=0.1)


def test_saved_and_loaded_is_the_same_to_fp16(scorer, tmp_path):
    scorer.save(tmp_path)
    again = Scorer.load(tmp_path)
    assert again.config == scorer.config
    for name, value in scorer.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().float(), rtol=0, atol=0)


def test_loading_says_what_is_wrong(scorer, tmp_path):
    with pytest.raises(UserError, match=r"scorer\.json is missing"):
        Scorer.load(tmp_path)
    scorer.save(tmp_path)
    config = tmp_path / "scorer.json"
    text = config.read_text()
    config.write_text(text.replace('"hidden": 16', '"hidden": 32'))
    with pytest.raises(UserError, match=r"does not fit scorer\.json"):
        Scorer.load(tmp_path)
    config.write_text(text.replace("hidden", "hiden"))
    with pytest.raises(UserError, match="hiden"):
        Scorer.load(tmp_path)
