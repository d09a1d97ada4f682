"""The kernels against torch's in float64."""

import threading

import pytest
import torch
from conftest import relative_error
from torch.nn import functional as F

from ldm.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler here")


WAYS = pytest.mark.parametrize("unpacked", [False, True], ids=["packed", "unpacked"])


def convolve(x, weight, bias, padding, unpacked):
    if unpacked:
        return native.convolve_unpacked(x, weight, bias, padding)
    return native.convolve(x, native.pack_winograd(weight), bias, len(weight), padding)


def drawn(shape, out_channels, unpacked, padding=1, layout=torch.channels_last, bias=True):
    """What the kernel makes of random numbers, and float64 of the same."""
    x = torch.randn(shape).to(memory_format=layout)
    weight = torch.randn(out_channels, shape[1], 3, 3).to(memory_format=layout)
    bias = torch.randn(out_channels) if bias else None
    wanted = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    return convolve(x, weight, bias, padding, unpacked), wanted


@WAYS
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
        ((3, 24, 30, 26), 20),  # more tiles than a weight is packed for at a time
    ],
    ids=str,
)
def test_equals_float64(shape, out_channels, padding, unpacked):
    ours, wanted = drawn(shape, out_channels, unpacked, padding)
    assert ours.shape == wanted.shape
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(ours, wanted) < 4e-6


@WAYS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "last"])
@pytest.mark.parametrize(
    ("shape", "out_channels"), [((2, 20, 9, 14), 33), ((2, 400, 12, 12), 64), ((1, 64, 5, 7), 96)], ids=str
)
def test_in_bf16_only_what_comes_out_is_rounded(shape, out_channels, layout, unpacked):
    """Twice as exactly as it is drawn: each number is the nearest of bf16 to the right one, or nearly."""
    x, bias = torch.randn(shape).bfloat16(), torch.randn(out_channels).bfloat16()
    weight = torch.randn(out_channels, shape[1], 3, 3).bfloat16().to(memory_format=layout)
    ours = convolve(x.to(memory_format=layout), weight, bias, 1, unpacked)
    assert ours.dtype is torch.bfloat16
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    nearest = relative_error(wanted.bfloat16().double(), wanted)
    assert relative_error(ours.double(), wanted) < 1.01 * nearest


@WAYS
def test_one_pixel(unpacked):
    ours, wanted = drawn((2, 3, 1, 1), 4, unpacked)
    assert relative_error(ours, wanted) < 4e-6


@WAYS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_and_no_bias(layout, unpacked):
    ours, wanted = drawn((2, 24, 10, 10), 24, unpacked, layout=layout, bias=False)
    assert relative_error(ours, wanted) < 4e-6


@WAYS
@pytest.mark.parametrize("shape", [(1, 64, 8, 8), (1, 80, 8, 8), (2, 704, 6, 6)], ids=str)
def test_whole_panels_of_weights_are_turned_in_registers(shape, unpacked):
    ours, wanted = drawn(shape, 64, unpacked)
    assert relative_error(ours, wanted) < 4e-6


@WAYS
def test_the_weight_of_a_lower_precision_is_taken_as_it_is(unpacked):
    x, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3, dtype=torch.bfloat16)
    ours = convolve(x, weight, None, 1, unpacked)
    assert relative_error(ours, F.conv2d(x.double(), weight.double(), padding=1)) < 4e-6


@WAYS
def test_a_batch_is_bit_for_bit_as_each_alone(unpacked):
    x, weight = torch.randn(5, 40, 18, 22), torch.randn(24, 40, 3, 3)
    together = convolve(x, weight, None, 1, unpacked)
    for k in range(5):
        assert torch.equal(together[k : k + 1], convolve(x[k : k + 1], weight, None, 1, unpacked))


GRADIENTS = pytest.mark.parametrize(
    ("shape", "out_channels"),
    [((2, 20, 9, 14), 33), ((1, 7, 4, 31), 16), ((3, 16, 8, 8), 5), ((5, 64, 16, 16), 24), ((1, 3, 3, 3), 4)],
    ids=str,
)


def gradient(shape, out_channels, padding, layout=torch.channels_last):
    """The kernel's gradient of a weight, and float64 of the same."""
    x = torch.randn(shape).to(memory_format=layout)
    weight = torch.randn(out_channels, shape[1], 3, 3, dtype=torch.float64, requires_grad=True)
    out = F.conv2d(x.double(), weight, padding=padding)
    grad = torch.randn(out.shape).to(memory_format=layout)
    out.backward(grad.double())
    return native.weight_gradient(x, grad, padding), weight.grad


@pytest.mark.parametrize("padding", [0, 1])
@GRADIENTS
def test_a_weights_gradient_is_float64s(shape, out_channels, padding):
    ours, wanted = gradient(shape, out_channels, padding)
    assert ours.shape == wanted.shape
    assert relative_error(ours, wanted) < 4e-6


@pytest.mark.parametrize("numbers", [1, 5000, 36 * 12 * 44])
def test_a_weights_gradient_is_summed_up_over_rounds(numbers, monkeypatch):
    monkeypatch.setattr(native, "GRADIENT_NUMBERS", numbers)
    assert relative_error(*gradient((2, 20, 9, 14), 24, 1, torch.contiguous_format)) < 4e-6


@pytest.fixture
def by_threads():
    """Draws by another number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@WAYS
@pytest.mark.parametrize("shape", [(1, 40, 4, 4), (2, 40, 16, 16), (2, 400, 12, 9), (1, 8, 90, 90)], ids=str)
def test_however_many_threads_it_is_the_same_to_the_bit(shape, unpacked, by_threads):
    x, weight, bias = torch.randn(shape), torch.randn(24, shape[1], 3, 3), torch.randn(24)
    made = []
    for threads in (1, 2, 3):
        by_threads(threads)
        made.append(convolve(x, weight, bias, 1, unpacked))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


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


@WAYS
def test_nan_and_inf_are_handed_on(unpacked):
    x = torch.randn(1, 16, 8, 8)
    x[0, 3, 2, 2] = torch.inf
    out = convolve(x, torch.randn(16, 16, 3, 3), None, 1, unpacked)
    assert not out[0, :, :4, :4].isfinite().any()
    assert out[0, :, 4:, 4:].isfinite().all()


# fp32: rounding of a few sums. bf16: of the result alone, half of its last bit.
DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)


@DTYPES
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (2, 20, 7, 9), (3, 64, 33, 40), (1, 8, 300, 299)], ids=str)
def test_group_norm(shape, silu, dtype, bound):
    x = (3 * torch.randn(shape) + 50).to(dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    wanted = F.group_norm(x.double().contiguous(), 4, weight.double(), bias.double(), 1e-5)
    ours = native.group_norm(x, 4, weight, bias, 1e-5, silu)
    assert ours.dtype is dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(ours.double(), F.silu(wanted) if silu else wanted) < bound
    alone = native.group_norm(x[-1:], 4, weight, bias, 1e-5, silu)
    assert torch.equal(ours[-1:], alone)


def test_group_norm_of_equal_pixels_is_its_bias():
    x = torch.full((1, 8, 5, 5), 1e4).to(memory_format=torch.channels_last)
    bias = torch.randn(8)
    ours = native.group_norm(x, 2, torch.ones(8), bias, 1e-5, False)
    assert torch.equal(ours, bias[None, :, None, None].expand_as(ours))


def test_a_nan_stays_in_its_group():
    x = torch.randn(1, 8, 5, 5).to(memory_format=torch.channels_last)
    x[0, 1, 2, 3] = torch.nan
    ours = native.group_norm(x, 2, torch.ones(8), torch.zeros(8), 1e-5, True)
    assert ours[0, :4].isnan().all()
    assert ours[0, 4:].isfinite().all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 26), (2, 64, 1280)], ids=str)
def test_geglu(shape, dtype, bound):
    x = (3 * torch.randn(shape)).to(dtype)
    value, gate = x.double().chunk(2, dim=-1)
    ours = native.geglu(x)
    assert ours.dtype is dtype
    assert relative_error(ours.double(), value * F.gelu(gate)) < bound


def test_silu_and_gelu_of_large_and_strange_numbers():
    """SiLU as the tail of a group norm whose scale is 1: of one channel's numbers, given as they are."""
    gate = torch.tensor([-1e30, -200.0, -88.0, -12.0, 0.0, 12.0, 88.0, 1e30])
    ours = native.geglu(torch.cat([torch.ones(8), gate]))
    assert relative_error(ours.double(), F.gelu(gate.double())) < 1e-6
    assert native.geglu(torch.tensor([1.0, torch.nan])).isnan().all()
    x = torch.cat([gate[1:-1], torch.zeros(2)]).view(1, 1, 1, 8)
    spread = x.double().std(correction=0)
    ours = native.group_norm(x, 1, spread.float()[None], x.mean()[None], 0.0, True)
    assert (ours.double() - F.silu(x.double())).abs().max() < 1e-4


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
