"""The kernel for attention in bf16 against float64, and where networks take it."""

import pytest
import torch
from conftest import relative_error
from torch.nn import functional as F

from ldm.kernels import native
from ldm.models import attention

pytestmark = pytest.mark.skipif(
    not native.available() or not native.has_attention(), reason="no AVX512-BF16, or AMX, or no compiler"
)

SHAPES = [  # (B, heads, N, M, d)
    (2, 8, 1024, 1024, 40),
    (1, 2, 300, 700, 64),  # blocks of keys, the last one not whole
    (2, 3, 50, 77, 80),
    (1, 2, 17, 1000, 160),
    (1, 1, 64, 64, 512),
    (2, 2, 9, 15, 41),  # an odd number of channels
    (1, 4, 33, 481, 24),
    (3, 1, 1, 1, 1),
    (1, 2, 8, 16, 2),
]


def tokens(batch, heads, count, wide, seed):
    """[B, heads, N, d], laid out as linear layers give it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, heads, wide, generator=generator).bfloat16().transpose(1, 2)


def given(batch, heads, n, m, wide):
    return [tokens(batch, heads, count, wide, seed) for seed, count in enumerate((n, m, m))]


def exact(q, k, v):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_as_nearly_as_torchs_own(shape):
    q, k, v = given(*shape)
    ours, right = native.attention(q, k, v), exact(q, k, v)
    assert ours.shape == right.shape
    assert ours.dtype is torch.bfloat16
    bound = max(3e-3, 1.1 * relative_error(F.scaled_dot_product_attention(q, k, v).double(), right))
    assert relative_error(ours.double(), right) < bound


def test_any_layout():
    q, k, v = given(2, 4, 70, 90, 40)
    ours = native.attention(q, k, v)
    assert ours.transpose(1, 2).is_contiguous()  # so that heads are merged for nothing
    assert torch.equal(native.attention(q.contiguous(), k.contiguous(), v.contiguous()), ours)
    turned = [each.transpose(2, 3).contiguous().transpose(2, 3) for each in (q, k, v)]
    assert torch.equal(native.attention(*turned), ours)
    wide = torch.cat([q, k.new_zeros(2, 4, 70, 8)], dim=-1)[..., :40]
    assert torch.equal(native.attention(wide, k, v), ours)


def test_each_picture_head_and_query_is_bit_for_bit_as_alone():
    q, k, v = given(3, 4, 37, 500, 40)
    together = native.attention(q, k, v)
    assert torch.equal(together[1:2], native.attention(q[1:2], k[1:2], v[1:2]))
    assert torch.equal(together[:, 2:3], native.attention(q[:, 2:3], k[:, 2:3], v[:, 2:3]))
    assert torch.equal(together[:, :, 21:22], native.attention(q[:, :, 21:22], k, v))


def test_however_many_threads_it_is_the_same_to_the_bit():
    q, k, v = given(2, 3, 600, 130, 40)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(native.attention(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(scale):
    q, k, v = given(1, 2, 40, 1200, 40)
    q = (q * scale).bfloat16()
    ours, right = native.attention(q, k, v), exact(q, k, v)
    bound = max(3e-3, 1.2 * relative_error(F.scaled_dot_product_attention(q, k, v).double(), right))
    assert relative_error(ours.double(), right) < bound


def test_the_largest_score_comes_last():
    """Sums are made smaller again when a larger score turns up, in a later block of keys."""
    q, k, v = given(1, 1, 16, 1500, 40)
    k[:, :, 1400] = 4 * q[:, :, 3]
    assert relative_error(native.attention(q, k, v).double(), exact(q, k, v)) < 2.5e-3


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_handed_on(which, value):
    all_three = given(1, 2, 20, 30, 40)
    all_three[which][0, 1, 7, 5] = value
    ours = native.attention(*all_three).float()
    assert not ours[0, 1].isfinite().all()
    assert ours[0, 0].isfinite().all()


def test_networks_take_it_where_no_gradient_is_wanted(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "attention", lambda q, k, v: calls.append(q.dtype) or q)
    q, k, v = given(1, 2, 16, 16, 40)
    with torch.no_grad():
        attention.attend(q, k, v)
        attention.attend(q.float(), k.float(), v.float())
    attention.attend(q.clone().requires_grad_(), k, v)
    assert calls == [torch.bfloat16]
