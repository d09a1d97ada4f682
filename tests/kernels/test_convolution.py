"""The convolution that trains in bf16 and draws in fp32 on a CPU, against torch's own in float64."""

import copy

import pytest
import torch
from conftest import relative_error
from torch import nn
from torch.nn import functional as F

from ldm.kernels import convolution, native
from ldm.kernels.convolution import Conv2d, weight_gradient

SHAPES = {  # (B, C, O, H, W, kernel, stride, padding)
    "3x3": (2, 6, 10, 5, 7, 3, 1, 1),
    "strided, odd": (2, 6, 10, 7, 5, 3, 2, 1),
    "strided, even": (1, 6, 10, 8, 6, 3, 2, 1),
    "strided, not padded": (1, 6, 10, 9, 6, 3, 2, 0),
    "1x1": (3, 6, 10, 4, 5, 1, 1, 0),
    "oblong": (2, 6, 10, 9, 8, (3, 2), (1, 3), (2, 1)),
    "one pixel": (1, 6, 10, 1, 1, 3, 1, 1),
}


def drawn(shape, dtype=torch.float32):
    """Input in channels_last, and a convolution: numbers that bf16 can hold."""
    batch, channels, out, height, width, *how = shape
    x = torch.randn(batch, channels, height, width).bfloat16().to(dtype)
    conv = Conv2d(channels, out, *how).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(p.bfloat16())
    return x.contiguous(memory_format=torch.channels_last), conv.to(dtype)


def gradients(conv, x, grad):
    """(output, gradients of input, weight, bias) by the forward of `conv`."""
    leaves = (x.detach().requires_grad_(), *conv.parameters())
    out = conv(leaves[0])
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def exact(conv, x, grad):
    like = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    like.load_state_dict(conv.state_dict())
    return gradients(like.double(), x.double(), grad.double())


def check_as_good(ours, torchs, expected):
    """Within the rounding of bf16, or on a processor that imitates it as near as torch's own kernel there."""
    for found, own, right in zip(ours, torchs, expected, strict=True):
        bound = max(2**-8, 1.01 * relative_error(own.float(), right))
        assert relative_error(found.float(), right) < bound


def plain(conv):
    """torch's own convolution with the weights of `conv`."""
    like = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    like.to(conv.weight.dtype).load_state_dict(conv.state_dict())
    return like.to(memory_format=torch.channels_last)


def is_ours(out):
    return type(out.grad_fn).__name__ == "_ConvolutionBackward"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weight_gradient_is_torchs_in_float64(shape):
    x, conv = drawn(shape, torch.float64)
    out = conv(x)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, conv.weight, grad)[0]
    ours = weight_gradient(x, grad, conv.weight.shape[2:], conv.stride, conv.padding)
    assert relative_error(ours, expected) < 1e-13
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("few_pixels", [0, convolution.FEW_PIXELS], ids=["many", "few"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_in_bf16_are_as_good_as_torchs(monkeypatch, shape, few_pixels):
    monkeypatch.setattr(convolution, "FEW_PIXELS", few_pixels)
    x, conv = drawn(shape)
    grad = torch.randn_like(conv(x)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = gradients(conv, x, grad), gradients(plain(conv), x, grad)
    assert is_ours(ours[0])
    assert torch.equal(ours[0], torchs[0])
    assert all(found.dtype == torch.float32 for found in ours[1:])
    check_as_good(ours[1:], torchs[1:], exact(conv, x, grad)[1:])
    assert ours[2].stride() == conv.weight.stride()  # autograd keeps it as it is


def test_weights_in_bf16_have_gradients_in_bf16():
    x, conv = drawn(SHAPES["3x3"])
    conv = conv.bfloat16()
    grad = torch.randn(2, 10, 5, 7).bfloat16()
    ours, torchs = gradients(conv, x.bfloat16(), grad), gradients(plain(conv), x.bfloat16(), grad)
    assert is_ours(ours[0])
    assert all(found.dtype == torch.bfloat16 for found in ours)
    check_as_good(ours, torchs, exact(conv.float(), x, grad))


@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "no bias"])
def test_only_what_is_wanted_has_a_gradient(frozen):
    x, conv = drawn(SHAPES["3x3"])
    x.requires_grad_(frozen != "input")
    conv.weight.requires_grad_(frozen != "weight")
    conv.bias.requires_grad_(frozen != "bias")
    if frozen == "no bias":
        conv.bias = None
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    assert is_ours(out) == (frozen != "weight")
    out.float().square().sum().backward()
    found = {"input": x.grad, "weight": conv.weight.grad, "bias": conv.bias is not None and conv.bias.grad}
    assert {name for name, g in found.items() if g is None} == ({frozen} & found.keys())


@pytest.fixture
def by_winograd(monkeypatch):
    """Small convolutions go by Winograd's way too, which is faster for large ones."""
    if not native.available():
        pytest.skip("no compiler here")
    monkeypatch.setattr(convolution, "WINOGRAD_PIXELS", 1)
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(convolution, "_has_quicker_bf16", lambda x, dtype: False)


def learns(conv, x):
    return type(conv(x).grad_fn).__name__ == "_WinogradBackward"


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("padding", [0, 1])
def test_gradients_in_fp32_are_float64s(padding, layout):
    x, conv = drawn((2, 6, 10, 9, 7, 3, 1, padding))
    x, conv = x.to(memory_format=layout), conv.to(memory_format=layout)
    assert learns(conv, x)
    grad = torch.randn_like(conv(x))
    ours, right = gradients(conv, x, grad), exact(conv, x, grad)
    assert all(relative_error(found, wanted) < 4e-6 for found, wanted in zip(ours, right, strict=True))
    assert ours[0].stride() == plain(conv).to(memory_format=layout)(x).stride()


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "no bias"])
def test_only_what_is_wanted_has_a_gradient_in_fp32(frozen):
    x, conv = drawn(SHAPES["3x3"])
    x.requires_grad_(frozen != "input")
    conv.weight.requires_grad_(frozen != "weight")
    conv.bias.requires_grad_(frozen != "bias")
    if frozen == "no bias":
        conv.bias = None
    assert learns(conv, x)
    conv(x).square().sum().backward()
    found = {"input": x.grad, "weight": conv.weight.grad, "bias": conv.bias is not None and conv.bias.grad}
    assert {name for name, g in found.items() if g is None} == ({frozen} & found.keys())


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "shape", [(2, 64, 32, 9, 7, 3, 1, 1), (2, 6, 10, 9, 7, 3, 1, 1), (2, 6, 10, 9, 7, 3, 1, 0)]
)
def test_a_frozen_weight_hands_its_inputs_gradient_on_in_bf16(shape, layout, autocast):
    """As with LoRA: only what goes through is rounded, as nearly as bf16 can have it."""
    x, conv = drawn(shape)
    x, conv = x.to(memory_format=layout), conv.to(memory_format=layout).requires_grad_(False)
    grad = torch.randn_like(conv(x)).bfloat16()
    right = exact(conv.requires_grad_(), x, grad)[:2]
    conv.requires_grad_(False)
    if not autocast:
        x, conv = x.bfloat16(), conv.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        leaf = x.clone().requires_grad_()
        assert learns(conv, leaf)
        out = conv(leaf)
        (found,) = torch.autograd.grad(out, leaf, grad)
    assert (out.dtype, found.dtype) == (torch.bfloat16, x.dtype)
    for ours, wanted in zip((out, found), right, strict=True):
        nearest = relative_error(wanted.bfloat16().double(), wanted)
        assert relative_error(ours.double(), wanted) < 1.02 * nearest


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("what", ["autocast", "double", "strided", "no gradients", "few channels"])
def test_what_winograd_is_not_for_is_torchs(what, monkeypatch):
    x, conv = drawn(SHAPES["strided, odd" if what == "strided" else "3x3"])
    if what == "double":
        x, conv = x.double(), conv.double()
    if what == "few channels":
        monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 61)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast")
    with autocast, torch.set_grad_enabled(what != "no gradients"):
        assert not learns(conv, x)


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}],
    ids=lambda options: next(iter(options)),
)
def test_what_it_does_not_know_is_torchs(options):
    conv, x = Conv2d(6, 10, 3, **({"padding": 1} | options)), torch.randn(2, 6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        expected = nn.Conv2d.forward(conv, x)
    assert not is_ours(out)
    assert torch.equal(out, expected)


def test_without_gradients_and_in_fp32_a_small_one_is_torchs():
    x, conv = drawn(SHAPES["3x3"])
    assert not is_ours(conv(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, 1, 1))
    with pytest.raises(RuntimeError, match="same"):  # as torch says of dtypes that differ
        conv(x.bfloat16())


def test_two_runs_are_bit_for_bit_the_same():
    x, conv = drawn((4, 64, 96, 8, 8, 3, 1, 1))
    grad = torch.randn(4, 96, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = gradients(conv, x, grad), gradients(conv, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def called(monkeypatch):
    """The names of the kernels that have convolved."""
    names = []

    def counted(name, kernel):
        return lambda *given, **how: names.append(name) or kernel(*given, **how)

    for name in ("convolve", "convolve_unpacked"):
        monkeypatch.setattr(native, name, counted(name, getattr(native, name)))
    return names


@pytest.mark.skipif(not native.available(), reason="no compiler here")
@pytest.mark.parametrize(
    ("channels", "size", "packs", "kernel"),
    [
        (64, (8, 8), True, "convolve"),
        (64, (80, 70), True, "convolve"),
        (64, (8, 8), False, "convolve_unpacked"),
        (264, (5, 7), True, "convolve_unpacked"),
        (264, (65, 65), True, "convolve_unpacked"),
    ],
)
def test_the_kernel_by_the_size_of_the_weight(called, channels, size, packs, kernel):
    layer = Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
    layer.packs = packs
    x = torch.randn(1, channels, *size)
    wanted = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert relative_error(layer(x), wanted) < 4e-6
    assert called == [kernel]


@pytest.mark.skipif(not native.available(), reason="no compiler here")
def test_the_kernels_draw_where_they_are_faster_and_only_there(called):
    layer = Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(1, 64, 12, 12)
    with torch.inference_mode():
        seamless, half = copy.deepcopy(layer), copy.deepcopy(layer).half()
        seamless.padding_mode = "circular"
        layer(torch.randn(1, 64, 3, 5)), half(x.half()), seamless(x)
        Conv2d(48, 48, 3, padding=1)(torch.randn(1, 48, 64, 64))
        Conv2d(64, 64, 3, stride=2, padding=1)(x)
    assert called == []
    layer(x).sum().backward()  # nothing is kept of a weight that changes
    assert called == ["convolve_unpacked"]


@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last])
def test_what_is_drawn_lies_as_torchs_does(of_x, of_weight):
    layer = Conv2d(128, 128, 3, padding=1).to(memory_format=of_weight).requires_grad_(False)
    x = torch.randn(2, 128, 32, 32).to(memory_format=of_x)
    assert layer(x).stride() == nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias).stride()


@pytest.mark.parametrize(
    "shape", [(3, 6, 10, 8, 8, 3, 2, 1), (1, 6, 10, 7, 5, 3, 2, 1), (2, 6, 10, 4, 6, 3, 2, 0)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strided_ones_of_few_pixels_are_as_exact_and_lie_as_torchs(shape, layout):
    x, conv = drawn(shape)
    x, conv = x.to(memory_format=layout), conv.to(memory_format=layout)
    with torch.inference_mode():
        ours, theirs = conv(x), nn.Conv2d._conv_forward(conv, x, conv.weight, conv.bias)
        exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)
        assert relative_error(ours, exact) < 1e-6
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, torch.cat([conv(each) for each in torch.split(x, 1)]))


@pytest.mark.skipif(convolution.is_imitated(torch.bfloat16), reason="this processor has no units for bf16")
@pytest.mark.parametrize(
    "shape",
    [
        (3, 70, 66, 4, 4, 3, 1, 1),
        (1, 70, 66, 3, 7, 3, 1, 0),
        (2, 6, 10, 8, 8, 3, 2, 1),
        (2, 70, 66, 9, 5, 1, 1, 0),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_small_ones_in_bf16_are_products_as_exact_and_lie_as_torchs(shape, layout, monkeypatch):
    x, conv = drawn(shape, torch.bfloat16)
    x, conv = x.to(memory_format=layout), conv.to(memory_format=layout)
    with torch.inference_mode():
        theirs = nn.Conv2d._conv_forward(conv, x, conv.weight, conv.bias)
        exact = plain(conv).double()(x.double())
        if layout is torch.channels_last:
            monkeypatch.setattr(F, "conv2d", None)  # not asked
        ours = conv(x)
        assert relative_error(ours.double(), exact) < 1.05 * relative_error(theirs.double(), exact) + 1e-4
        assert ours.stride() == theirs.stride()
