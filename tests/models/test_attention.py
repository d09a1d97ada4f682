"""Every kernel that `attend` may choose, against softmax(q k^T / sqrt(d)) v in float64."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from torch.nn import functional as F

from ldm.models import attention
from ldm.models.layers import GroupNorm, timestep_features


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


def test_xformers_gets_the_layout_it_wants(monkeypatch):
    """A stand-in for its kernel, which takes [B, N, heads, d], and tensors that say they are on CUDA."""

    shapes = []

    def kernel(q, k, v):
        shapes.append(q.shape)
        return exact(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    module = SimpleNamespace(memory_efficient_attention=kernel, __spec__=True)
    monkeypatch.setitem(sys.modules, "xformers", module)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    attention._xformers.cache_clear()
    try:
        q, k, v = qkv()

        class OnCuda(torch.Tensor):
            is_cuda = True

        out = attention.attend(q.as_subclass(OnCuda), k, v)
        assert shapes == [(2, 20, 3, 8)]
        assert relative_error(out.as_subclass(torch.Tensor), exact(q, k, v)) < 1e-6
    finally:
        attention._xformers.cache_clear()


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


@pytest.mark.parametrize("flip", [False, True])
def test_timestep_features_are_sines_and_cosines(flip):
    t, dim = torch.tensor([0.0, 0.5, 999.0]), 9
    w = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    sines, cosines = torch.sin(t[:, None] * w), torch.cos(t[:, None] * w)
    pair = [cosines, sines] if flip else [sines, cosines]
    expected = torch.cat([*pair, torch.zeros(3, 1)], dim=1)
    assert relative_error(timestep_features(t, dim, flip_sin_to_cos=flip), expected) < 1e-4
