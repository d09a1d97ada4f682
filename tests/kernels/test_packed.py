"""Packed weights live as long as their weight stays what it is."""

import gc

import pytest
import torch
from torch import nn

from ldm.kernels import native, packed

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler here")


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(32, 16, 3, 3), requires_grad=False)


def test_is_made_once(weight):
    first = packed.winograd(weight)
    assert packed.winograd(weight) is first
    assert torch.equal(first, native.pack_winograd(weight))


def test_is_made_again_when_the_weight_has_changed(weight):
    first = packed.winograd(weight)
    with torch.no_grad():
        weight.mul_(2)
    second = packed.winograd(weight)
    assert torch.equal(second, 2 * first)
    weight.data = torch.zeros_like(weight)
    assert not packed.winograd(weight).any()


def test_is_kept_for_no_longer_than_a_module():
    before, layer = packed.nbytes(), nn.Conv2d(16, 16, 3)
    packed.winograd(layer.weight)
    assert packed.nbytes() > before
    del layer
    gc.collect()
    assert packed.nbytes() == before


def test_memory_that_is_short_is_left(weight, monkeypatch):
    monkeypatch.setattr(packed, "SHARE", 0)
    assert packed.winograd(weight) is None


def test_what_does_not_count_its_changes_is_not_kept():
    with torch.inference_mode():
        assert packed.winograd(torch.randn(16, 16, 3, 3)) is None
