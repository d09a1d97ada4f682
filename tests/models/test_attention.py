"""Every kernel that `attend` may choose, against softmax(q k^T / sqrt(d)) v in float64."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from torch.nn import functional as F

from ldm.models import attention, layers
from ldm.models.layers import FeedForward, GroupNorm, timestep_features


def qkv(queries=20, keys=7):
    return torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)


def exact(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    return ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("limit", [{}, attention.PLAIN_SCORES], ids=["sdpa", "plain"])
def test_kernels_and_their_gradients(monkeypatch, limit):
    monkeypatch.setattr(attention, "PLAIN_SCORES", limit)
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append(1) or sdpa(*args))
    leaves = [a.requires_grad_() for a in qkv()]
    out, expected = attention.attend(*leaves), exact(*leaves)
    assert len(calls) == (not limit)
    assert relative_error(out, expected) < 1e-6
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_without_a_gradient_sdpa_is_used(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q * 0 + 5)
    assert (attention.attend(*qkv()) == 5).all()


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in for its kernel, which takes [B, N, heads, d]: d up to 128 by multiples of 8, and no fp32."""

    def kernel(q, k, v):
        stand_in.asked.append(tuple(q.shape))
        if stand_in.error is not None:
            raise stand_in.error
        if q.shape[-1] % 8 or q.shape[-1] > 128 or q.dtype is torch.float32:
            raise NotImplementedError(
                f"No operator found for `memory_efficient_attention_forward`\n{q.shape}"
            )
        return exact(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).to(q.dtype)

    stand_in = SimpleNamespace(memory_efficient_attention=kernel, __spec__=True, asked=[], error=None)
    monkeypatch.setitem(sys.modules, "xformers", stand_in)
    monkeypatch.setitem(sys.modules, "xformers.ops", stand_in)
    monkeypatch.setattr(attention, "_REFUSED", set(), raising=False)
    attention._xformers.cache_clear()
    yield stand_in
    attention._xformers.cache_clear()


def on_cuda(q, k, v):
    return attention.attend(q.as_subclass(OnCuda), k, v).as_subclass(torch.Tensor)


def heads_of(dim, dtype=torch.float16):
    return [torch.randn(2, 3, tokens, dim).to(dtype) for tokens in (20, 7, 7)]


def test_xformers_gets_the_layout_it_wants(xformers):
    q, k, v = heads_of(8)
    assert relative_error(on_cuda(q, k, v), exact(q, k, v)) < 1e-3
    assert xformers.asked == [(2, 20, 3, 8)]


def test_what_xformers_cannot_do_is_tried_once_and_told_once(xformers):
    """52 is the head dimension of the embedded model's second level, 512 that of Stable Diffusion's VAE."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            for asked in (heads_of(52), heads_of(512), heads_of(64), heads_of(64, torch.float32)):
                assert relative_error(on_cuda(*asked), exact(*asked)) < 2e-3
    assert [shape[-1] for shape in xformers.asked] == [52, 512, 64, 64, 64]
    (only,) = told
    assert str(only.message) == (
        "xformers: no kernel for queries [2, 3, 20, 52] in float16, so torch's own attention is used "
        "(No operator found for `memory_efficient_attention_forward`)"
    )


def test_the_default_model_draws_where_xformers_has_no_kernel_at_all(xformers):
    """As on cards that are newer than it, or without its extensions for the torch that is there."""
    xformers.error = NotImplementedError("xFormers can't load C++/CUDA extensions")
    block = attention.TransformerBlock(16, 8, 2).eval()
    x, context = torch.randn(1, 9, 16), torch.randn(1, 5, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = block(x, context)
        drawn = block(x.as_subclass(OnCuda), context)
    assert xformers.asked
    assert torch.equal(drawn.as_subclass(torch.Tensor), expected)


def test_an_xformers_that_does_not_load_is_as_none(xformers, monkeypatch):
    def fail(name):
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(attention, "import_module", fail)
    with pytest.warns(UserWarning, match="xformers: it does not load, so torch's own attention is used"):
        assert attention._xformers() is None


def test_memory_that_is_out_is_not_xformers_fault(xformers):
    xformers.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        on_cuda(*heads_of(8))
    xformers.error = None
    on_cuda(*heads_of(8))
    assert len(xformers.asked) == 2


@pytest.mark.parametrize("which", range(3))
def test_with_a_gradient_torch_is_asked(xformers, which):
    """A kernel that is missing would show in the backward pass only."""
    leaves = heads_of(8)
    leaves[which].requires_grad_()
    on_cuda(*leaves).sum().backward()
    assert leaves[which].grad is not None
    assert xformers.asked == []


def test_group_norm_in_16_bits_is_torchs_own_in_either_layout():
    norm, x = GroupNorm(4, 16), torch.randn(2, 16, 6, 5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    for layout in (torch.contiguous_format, torch.channels_last):
        half = x.bfloat16().to(memory_format=layout)
        out = norm(half)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=layout)
        assert relative_error(out.float(), expected) < 0.02


def test_group_norm_of_a_large_map_is_exact_in_either_layout():
    norm = GroupNorm(4, 8).requires_grad_(False)
    x = torch.randn(1, 8, 700, 700) + 3
    expected = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert relative_error(norm(x.to(memory_format=layout), silu=True), expected) < 2e-6


def test_a_feed_forward_layer_in_parts_is_the_whole(monkeypatch):
    layer, x = FeedForward(16).requires_grad_(False), torch.randn(2, 37, 16)
    whole = layer(x)
    value, gate = layer.net[0].proj.double()(x.double()).chunk(2, dim=-1)
    assert relative_error(whole, layer.net[2].double()(value * F.gelu(gate))) < 1e-6
    layer.float()
    monkeypatch.setattr(layers, "WIDE_BYTES", 10 * 8 * 16 * 4)
    with torch.no_grad():
        parts = layer(x)
    assert relative_error(parts, whole) < 1e-6


@pytest.mark.parametrize("flip", [False, True])
def test_timestep_features_are_sines_and_cosines(flip):
    t, dim = torch.tensor([0.0, 0.5, 999.0]), 9
    w = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    sines, cosines = torch.sin(t[:, None] * w), torch.cos(t[:, None] * w)
    pair = [cosines, sines] if flip else [sines, cosines]
    expected = torch.cat([*pair, torch.zeros(3, 1)], dim=1)
    assert relative_error(timestep_features(t, dim, flip_sin_to_cos=flip), expected) < 1e-4
