"""Rows in, results out: each row has one, whatever happens to its neighbours."""

import json

import numpy as np
import pytest
import torch

import ldm
from ldm.bulk import mapper as mapping
from ldm.bulk.mapper import Drawn, Failed, Mapper, Models, request_of
from ldm.bulk.rows import Row
from ldm.pipeline.sample import draw_batch

LONG = " ".join(["the red boat"] * 12)  # of two windows


def row(name, **fields):
    small = {"prompt": "the sea", "num_inference_steps": 2, "width": 16, "height": 16}
    return Row(name, json.dumps(small | fields))


@pytest.fixture
def pipe(tiny_folder):
    return ldm.load(str(tiny_folder), dtype="fp32")


@pytest.fixture
def mapper(pipe):
    return Mapper(Models(pipe, lambda name: pytest.fail(f"{name} is not to be read")))


def drawn(results):
    """id -> the picture's levels, or why there is none."""
    results = list(results)
    found = {each.row.id: each for each in results}
    assert len(found) == len(results)
    return {
        name: np.asarray(each.image, int) if isinstance(each, Drawn) else each.reason
        for name, each in found.items()
    }


def broken(monkeypatch, error, when):
    def draw(job, batch):
        if when(batch):
            raise error
        return draw_batch(job, batch)

    monkeypatch.setattr(mapping, "draw_batch", draw)


def check_alone(pipe, rows, found):
    for each in rows:
        alone = np.asarray(pipe.generate(request_of(each)).images[0], int)
        assert np.abs(alone - found[each.id]).max() <= 1


def test_prompts_of_other_lengths_are_drawn_as_alone(pipe, mapper):
    rows = [row("a"), row("b", prompt=LONG), row("c", prompt="the red boat", negative_prompt="the sea")]
    check_alone(pipe, rows, drawn(mapper(rows)))


def test_bad_values_fail_alone(pipe, mapper):
    rows = [row("a"), row("b", seeds=[1, 2]), row("c"), row("d", seeds=-2.5), row("e", model_hash="0" * 10)]
    found = drawn(mapper(rows))
    check_alone(pipe, [rows[0], rows[2]], found)
    assert "a row is one picture" in found["b"]
    assert "this asks for the model None (0000000000), not tiny" in found["e"]


def test_a_row_that_cannot_be_prepared_fails_alone(pipe, mapper):
    rows = [row("a"), row("b", image="nowhere.png"), row("c", prompt="(the sea:1.3)")]
    found = drawn(mapper(rows))
    check_alone(pipe, [rows[0], rows[2]], found)
    assert "nowhere.png" in found["b"]


def test_a_picture_that_is_not_finite_fails_alone(pipe, mapper, monkeypatch):
    rows = [row("a", seeds=[1]), row("b", seeds=[2]), row("c", seeds=[3])]
    broken(monkeypatch, FloatingPointError("the U-Net gave NaN\nmore"), lambda b: 2 in [p.seed for p in b])
    found = drawn(mapper(rows))
    assert found["b"] == "the U-Net gave NaN"
    check_alone(pipe, [rows[0], rows[2]], found)


def test_a_batch_that_is_too_large_is_drawn_one_by_one(pipe, mapper, monkeypatch):
    rows = [row("a"), row("b"), row("c")]
    broken(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda batch: len(batch) > 1)
    check_alone(pipe, rows, drawn(mapper(rows)))
    broken(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda batch: True)
    assert {*drawn(mapper(rows)).values()} == {"not enough memory for this picture: ask for a smaller one"}


def test_a_card_that_is_lost_is_no_rows_fault(mapper, monkeypatch):
    broken(monkeypatch, torch.AcceleratorError("CUDA error: device-side assert triggered"), lambda b: True)
    with pytest.raises(torch.AcceleratorError):
        list(mapper([row("a")]))


def test_our_own_mistake_is_told_by_its_kind(mapper, monkeypatch):
    broken(monkeypatch, KeyError("x"), lambda batch: True)
    assert list(mapper([row("a")])) == [Failed(row("a"), "KeyError: 'x'")]


def test_one_other_model_is_held_at_a_time(pipe):
    read = []
    models = Models(pipe, lambda name: read.append(name) or name)
    assert [models(name) for name in (None, "tiny", "a", "a", "b", "a")] == [pipe, pipe, "a", "a", "b", "a"]
    assert read == ["a", "b", "a"]


@pytest.mark.filterwarnings("ignore:seed")  # its border is not plain
def test_transparent_rows_have_alpha(mapper):
    found = drawn(mapper([row("a", transparent=True)]))
    assert found["a"].shape == (16, 16, 4)
