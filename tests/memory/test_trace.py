"""What a call would take, against what can be counted by hand, and by torch's own profiler."""

import pytest
import torch
from tiny_pipeline import tiny_unet
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ldm.kernels import native, packed
from ldm.kernels.convolution import Conv2d
from ldm.memory.trace import on_meta, peak, peak_and_rest
from ldm.models import UNet

CPU = torch.device("cpu")


def test_what_lives_at_once_is_counted_and_what_is_dropped_is_not():
    x = torch.empty(1000, device="meta")

    def call():
        y = x + 1  # 4000 bytes
        z = y * 2  # 8000
        del y
        return z.view(10, 100) + 1  # 8000 again: a view takes nothing

    assert peak(call, CPU) == 8000


def test_attention_holds_no_scores_but_where_a_kernel_does():
    q = torch.empty(1, 2, 64, 8, device="meta")
    out = 2 * 64 * 8 * 4

    def call():
        return F.scaled_dot_product_attention(q, q, q)

    assert peak(call, CPU) == out
    assert peak(call, torch.device("mps")) == max(out, 2 * 64 * 64 * 4)


def test_networks_choose_their_kernels_as_on_the_device_that_is_meant():
    seen = []

    class Asks(nn.Module):
        def forward(self, x):
            seen.append((x.device, x.is_cuda))
            return torch.zeros(4, device=x.device) + x.to(x.device)

    peak(lambda: Asks()(torch.empty(4, device="meta")), torch.device("cuda"))
    assert seen == [(torch.device("cuda"), True)]


def test_a_traced_unet_takes_what_torchs_profiler_sees_a_real_one_take():
    theirs = tiny_unet(block_out_channels=(32, 64), sample_size=32)
    ours = UNet.from_config(dict(theirs.config)).eval().requires_grad_(False)
    ours = ours.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 32, 32).to(memory_format=torch.channels_last)
    context = torch.randn(2, 16, 24)
    before = packed.nbytes()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        ours(x, torch.tensor(1.0), context)
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    most += packed.nbytes() - before  # which are mapped, and not torch's
    meta = on_meta(ours)
    traced = peak(lambda: meta(x.to("meta"), torch.empty((), device="meta"), context.to("meta")), CPU)
    assert traced == pytest.approx(most, rel=0.15)
    assert not any(each.is_meta for each in ours.parameters())


@pytest.mark.skipif(not native.available(), reason="no compiler here")
@pytest.mark.parametrize("packs", [True, False])
def test_weights_that_are_packed_for_kernels_stay(packs):
    layer = Conv2d(128, 128, 3, padding=1).requires_grad_(False).to("meta")
    layer.packs = packs
    x = torch.empty(1, 128, 32, 32, device="meta").to(memory_format=torch.channels_last)
    most, rest = peak_and_rest(lambda: layer(x), CPU)
    assert rest == (4 * 36 * 128 * 128 if packs else 0)
    assert most >= rest + 4 * x.numel()
    before = packed.nbytes()
    real = Conv2d(128, 128, 3, padding=1).requires_grad_(False)
    real.packs = packs
    real(torch.randn(1, 128, 32, 32))
    assert packed.nbytes() - before == rest
