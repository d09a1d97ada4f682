"""The change of each kind against its definition written out, layer by layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ldm
from ldm.adapters.deltas import make_delta
from ldm.adapters.layers import adapt_module, share

CASES = {
    "linear": (lambda: nn.Linear(6, 8), (2, 5, 6)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 4)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 6, 4)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 4)),
}


def layer_of(case):
    layer = nn.Sequential(CASES[case][0]()).requires_grad_(False)
    return layer, torch.randn(CASES[case][1])


def run(layer, x, weight):
    """The layer with another weight, in float64."""
    bias = layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), weight, bias)
    return F.conv2d(x.double(), weight, bias, layer.stride, layer.padding)


def random(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_lora(case, fused):
    layer, x = layer_of(case)
    weight = layer[0].weight.double()
    up, down = random((8, 3), (3, *weight.shape[1:]))
    if weight.ndim == 4:
        up = up[:, :, None, None]
    delta = make_delta({"up": up.float(), "down": down.float(), "alpha": torch.tensor(6.0)}, None)
    adapted = adapt_module(layer, {"0": [(delta, 0.7)]}, fused)
    change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    expected = run(layer[0], x, weight + 0.7 * 6 / 3 * change)
    assert torch.allclose(adapted(x).double(), expected, atol=1e-5)
    assert (adapted[0].weight is layer[0].weight) != fused


@pytest.mark.parametrize("case", ["conv", "strided"])
def test_locon_with_a_middle_is_three_convolutions(case):
    layer, x = layer_of(case)
    down, mid, up = random((3, 6, 1, 1), (3, 3, 3, 3), (8, 3, 1, 1))
    tensors = {"down": down.float(), "mid": mid.float(), "up": up.float(), "alpha": torch.tensor(1.5)}
    adapted = adapt_module(layer, {"0": [(make_delta(tensors, None), 1.0)]}, False)
    inner = F.conv2d(F.conv2d(x.double(), down), mid, None, layer[0].stride, layer[0].padding)
    expected = run(layer[0], x, layer[0].weight.double()) + 0.5 * F.conv2d(inner, up)
    assert torch.allclose(adapted(x).double(), expected, atol=1e-5)


def test_two_loras_on_one_layer_add():
    layer, x = layer_of("conv")
    weight, total, deltas = layer[0].weight.double(), layer[0].weight.double().clone(), []
    for rank, strength in ((2, 0.7), (3, -0.4)):
        up, down = random((8, rank), (rank, 6, 3, 3))
        deltas.append((make_delta({"up": up.float(), "down": down.float()}, None), strength))
        total += strength * (up @ down.flatten(1)).reshape(weight.shape)
    adapted = adapt_module(layer, {"0": deltas}, False)
    assert torch.allclose(adapted(x).double(), run(layer[0], x, total), atol=1e-5)


def test_loha_and_lora_on_one_layer_add():
    layer, x = layer_of("linear")
    weight = layer[0].weight.double()
    a1, b1, a2, b2, up, down = random((8, 2), (2, 6), (8, 2), (2, 6), (8, 3), (3, 6))
    hada = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    loha = make_delta({name: t.float() for name, t in hada.items()} | {"alpha": torch.tensor(1.0)}, None)
    lora = make_delta({"up": up.float(), "down": down.float()}, None)
    adapted = adapt_module(layer, {"0": [(loha, 0.5), (lora, 2.0)]}, False)
    expected = run(layer[0], x, weight + 0.5 * 0.5 * (a1 @ b1) * (a2 @ b2) + 2 * up @ down)
    assert torch.allclose(adapted(x).double(), expected, atol=1e-5)


def test_lokr_by_blocks():
    """The Kronecker product, written as blocks of w1[i, j] * w2."""
    layer, x = layer_of("conv")
    w1, a, b = random((2, 3), (4, 1), (1, 2 * 9))
    w2 = (a @ b).reshape(4, 2, 3, 3)
    blocks = torch.cat([torch.cat([w1[i, j] * w2 for j in range(3)], dim=1) for i in range(2)])
    tensors = {"lokr_w1": w1.float(), "lokr_w2_a": a.float(), "lokr_w2_b": b.float()}
    adapted = adapt_module(layer, {"0": [(make_delta(tensors, None), 1.0)]}, False)
    expected = run(layer[0], x, layer[0].weight.double() + blocks)
    assert torch.allclose(adapted(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("case", ["linear", "conv"])
def test_dora(case, axis):
    """LyCORIS' magnitudes, one per output or (older files) per input. Weight 0 is the model without it."""
    layer, x = layer_of(case)
    weight = layer[0].weight.double()
    up, down = random((8, 3), (3, *weight.shape[1:]))
    changed = weight + (up @ down.flatten(1)).reshape(weight.shape)
    keep = 0 if axis == "output" else 1
    shape = [-1 if k == keep else 1 for k in range(weight.ndim)]
    magnitude = torch.rand(weight.shape[keep], dtype=torch.float64) + 0.5
    norm = changed.pow(2).sum([k for k in range(weight.ndim) if k != keep], keepdim=True).sqrt()
    whole = magnitude.reshape(shape) * changed / norm
    tensors = {"up": up.float(), "down": down.float(), "dora_scale": magnitude.reshape(shape).float()}
    for strength in (1.0, 0.3):
        adapted = adapt_module(layer, {"0": [(make_delta(tensors, None), strength)]}, False)
        expected = run(layer[0], x, weight + strength * (whole - weight))
        assert torch.allclose(adapted(x).double(), expected, atol=1e-5)


def test_linear_factors_fit_a_pointwise_convolution_and_the_other_way_round():
    up, down = torch.randn(8, 3), torch.randn(3, 6)
    flat, images = {"up": up, "down": down}, {"up": up[..., None, None], "down": down[..., None, None]}
    for case, tensors in (("pointwise", flat), ("linear", images)):
        layer, x = layer_of(case)
        adapted = adapt_module(layer, {"0": [(make_delta(tensors, None), 1.0)]}, False)
        weight = layer[0].weight.double()
        change = (up @ down).double().reshape(weight.shape)
        assert torch.allclose(adapted(x).double(), run(layer[0], x, weight + change), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dense_weight_is_cast_once(dtype):
    """Computed in fp32: the nearest number to the exact sum, where adding in 16 bits would round twice."""
    layer = nn.Sequential(nn.Linear(64, 64)).to(dtype).requires_grad_(False)
    up, down = torch.randn(64, 8) / 8, torch.randn(8, 64) / 8
    delta = make_delta({"up": up, "down": down}, None)
    fused = adapt_module(layer, {"0": [(delta, 0.3)]}, True)
    exact = layer[0].weight.double() + 0.3 * up.double() @ down.double()
    wrong = (fused[0].weight != exact.to(dtype)).double().mean()
    assert fused[0].weight.dtype == dtype
    assert wrong < 1e-3
    twice = layer[0].weight + (0.3 * up @ down).to(dtype)
    assert (twice != exact.to(dtype)).double().mean() > 0.05


def test_shared_modules_are_new_and_tensors_are_not():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2))
    copied = share(module)
    for ours, theirs in zip(module.modules(), copied.modules(), strict=True):
        assert ours is not theirs
        assert type(ours) is type(theirs)
    own, others = module.state_dict(keep_vars=True), copied.state_dict(keep_vars=True)
    assert list(own) == list(others)
    assert all(own[name] is others[name] for name in own)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up": (8, 3)}, "has no down"),
        ({"alpha": ()}, "no LoRA, LoHa or LoKr"),
        ({"up": (8, 3), "down": (3, 6), "lokr_w1": (2, 2)}, "lokr_w1 beside those of a LoRA"),
        ({"hada_w1_a": (8, 3), "hada_w1_b": (3, 6)}, "has no hada_w2_a, hada_w2_b"),
        ({"lokr_w1": (2, 2), "lokr_w2_b": (3, 6)}, "has no lokr_w2_a"),
    ],
)
def test_incomplete(tensors, message):
    with pytest.raises(ldm.UserError, match=message):
        make_delta({name: torch.ones(shape) for name, shape in tensors.items()}, None)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up": (8, 3), "down": (4, 6)}, "different ranks"),
        ({"up": (8, 3), "down": (3, 7)}, "changes a layer of 7 -> 8"),
        ({"up": (9, 3), "down": (3, 6)}, "changes a layer of 6 -> 9"),
        ({"up": (8, 3), "down": (3, 6), "magnitude": (9,)}, "magnitudes"),
        ({"hada_w1_a": (8, 3), "hada_w1_b": (2, 6), "hada_w2_a": (8, 3), "hada_w2_b": (3, 6)}, "ranks"),
        ({"lokr_w1": (2, 2), "lokr_w2": (3, 3)}, "changes a layer of 6 -> 6"),
    ],
)
def test_misfits_are_seen_without_computing(tensors, message):
    delta = make_delta({name: torch.ones(shape) for name, shape in tensors.items()}, None)
    with pytest.raises(ldm.UserError, match=message):
        delta.change(torch.empty(8, 6, device="meta"))
