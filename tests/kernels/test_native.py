"""Winograd's convolution against torch's in float64."""

import threading

import pytest
import torch
from conftest import relative_error
from torch.nn import functional as F

from ldm.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler here")


def drawn(shape, out_channels, padding=1, layout=torch.channels_last, bias=True):
    """What the kernel makes of random numbers, and float64 of the same."""
    x = torch.randn(shape).to(memory_format=layout)
    weight = torch.randn(out_channels, shape[1], 3, 3).to(memory_format=layout)
    bias = torch.randn(out_channels) if bias else None
    ours = native.convolve(x, native.pack_winograd(weight), bias, out_channels, padding)
    wanted = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    return ours, wanted


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [
        ((1, 1, 3, 3), 1),
        ((2, 20, 9, 14), 33),
        ((1, 7, 4, 31), 16),
        ((3, 16, 8, 8), 5),
        ((1, 400, 12, 12), 40),  # more channels than a panel takes at a time
        ((1, 900, 5, 6), 17),
    ],
    ids=str,
)
def test_equals_float64(shape, out_channels, padding):
    ours, wanted = drawn(shape, out_channels, padding)
    assert ours.shape == wanted.shape
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(ours, wanted) < 4e-6


def test_one_pixel():
    ours, wanted = drawn((2, 3, 1, 1), 4)
    assert relative_error(ours, wanted) < 4e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_and_no_bias(layout):
    ours, wanted = drawn((2, 24, 10, 10), 24, layout=layout, bias=False)
    assert relative_error(ours, wanted) < 4e-6


def test_the_weight_of_a_lower_precision_is_taken_as_it_is():
    x, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3, dtype=torch.bfloat16)
    ours = native.convolve(x, native.pack_winograd(weight), None, 32)
    assert relative_error(ours, F.conv2d(x.double(), weight.double(), padding=1)) < 4e-6


def test_a_batch_is_bit_for_bit_as_each_alone():
    x, packed = torch.randn(5, 40, 18, 22), native.pack_winograd(torch.randn(24, 40, 3, 3))
    together = native.convolve(x, packed, None, 24)
    for k in range(5):
        assert torch.equal(together[k : k + 1], native.convolve(x[k : k + 1], packed, None, 24))


def test_threads_share_it():
    packed, made = native.pack_winograd(torch.randn(32, 32, 3, 3)), {}
    given = [torch.randn(1, 32, 40, 40) for _ in range(4)]
    alone = [native.convolve(x, packed, None, 32) for x in given]
    threads = [
        threading.Thread(target=lambda k=k: made.update({k: native.convolve(given[k], packed, None, 32)}))
        for k in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(made[k], alone[k]) for k in range(4))


def test_nan_and_inf_are_handed_on():
    x = torch.randn(1, 16, 8, 8)
    x[0, 3, 2, 2] = torch.inf
    out = native.convolve(x, native.pack_winograd(torch.randn(16, 16, 3, 3)), None, 16)
    assert not out[0, :, :4, :4].isfinite().any()
    assert out[0, :, 4:, 4:].isfinite().all()


def test_what_fits():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    assert native.fits(x, weight)
    assert not native.fits(x.half(), weight)
    assert not native.fits(x, weight.requires_grad_())
    with torch.no_grad():
        assert native.fits(x, weight)
        assert not native.fits(x.to("meta"), weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert not native.fits(x, weight)
