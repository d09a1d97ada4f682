"""Layers over bands of rows, against torch's own on the whole map."""

import pytest
import torch
from conftest import randomise_, relative_error
from torch.nn import functional as F

from ldm.models import bands
from ldm.models.bands import Convolved, Enlarged, Normed, Pointwise, Stored, stored
from ldm.models.layers import GroupNorm


@pytest.fixture(autouse=True)
def thin_bands(monkeypatch):
    """Several in a small map: 4 rows each, two of them in one block of memory."""
    monkeypatch.setattr(bands, "BAND_BYTES", 1)
    monkeypatch.setattr(bands, "BANDS_EACH", 2)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1), (3, 2, 0)])
@torch.no_grad()
def test_a_convolution_makes_each_row_once(kernel, stride, padding, layout, monkeypatch):
    x = torch.randn(2, 4, 37, 21).to(memory_format=layout)
    conv = randomise_(torch.nn.Conv2d(4, 6, kernel, stride, padding))
    layer = Convolved(Stored([*x.split(5, 2)]), conv, pad_right_bottom=padding == 0 and kernel == 3)
    asked, convolve = [], layer._convolve
    monkeypatch.setattr(layer, "_convolve", lambda *rows: asked.append(rows) or convolve(*rows))
    below = Convolved(layer, randomise_(torch.nn.Conv2d(6, 5, 3, padding=1)))
    out = stored(Pointwise(torch.add, below, Pointwise(lambda each: each[:, :5], layer))).whole()
    middle = conv(F.pad(x, (0, 1, 0, 1)) if layer.after > layer.before else x)
    assert relative_error(out, below.conv(middle) + middle[:, :5]) < 1e-5
    assert sum(stop - start for start, stop in asked) == layer.height == middle.shape[2]
    assert out.is_contiguous(memory_format=layout)


@torch.no_grad()
def test_statistics_are_of_the_whole_map():
    """In float64, where the mean is a thousand times the deviation."""
    x = torch.randn(2, 8, 50, 6) + 1000 * torch.linspace(-1, 1, 8)[:, None, None]
    norm = randomise_(GroupNorm(4, 8))
    found = stored(Normed(Stored([*x.split(7, 2)]), norm, lambda each: each)).whole()
    assert relative_error(found, torch.nn.GroupNorm.forward(norm.double(), x.double()).float()) < 1e-4


def test_maps_are_given_back_as_soon_as_no_row_of_them_is_wanted():
    held = []
    source = Stored([torch.randn(1, 2, 4, 5) for _ in range(10)])

    class Watched(Convolved):
        def rows(self, start, stop):
            held.append(sum(block is not None for block in source._blocks))
            return super().rows(start, stop)

    with torch.no_grad():
        made = stored(Watched(Enlarged(source), torch.nn.Conv2d(2, 2, 3, padding=1)))
    assert made.height == 80
    assert held[0] == 10
    assert held[-1] <= 2
    with pytest.raises(RuntimeError, match="given back"):
        source.rows(0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_processor_without_units_for_16_bits_convolves_in_fp32(dtype, monkeypatch):
    x, conv = torch.randn(1, 4, 9, 9).to(dtype), randomise_(torch.nn.Conv2d(4, 4, 3, padding=1)).to(dtype)
    exact = conv.float()(x.float()).to(dtype)
    conv.to(dtype)
    monkeypatch.setattr(bands, "imitates", lambda x: True)
    assert torch.equal(stored(Convolved(Stored([x]), conv)).whole(), exact)
