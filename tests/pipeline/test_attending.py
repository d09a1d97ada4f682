"""What is done in attention's place: at each layer that attends, in one drawing alone."""

from dataclasses import replace

import pytest
import torch

import ldm
from ldm.models.attention import Attention, attend
from ldm.pipeline.networks import Joined
from ldm.pipeline.sample import draw_batch
from ldm.request import Request

ASKED = Request(prompt="a red boat", num_inference_steps=2, sampler="euler", width=64, height=32)


@pytest.fixture(scope="module")
def pipe():
    return ldm.load(dtype="fp32")


def drawn(pipe, *attending):
    job = pipe.prepare(ASKED)
    return draw_batch(replace(job, attending=attending), job.batches[0]).images


def test_the_same_attention_draws_the_same_picture_and_sees_every_layer(pipe):
    seen = set()

    def around(names, cond, base):
        assert names == ("uncond", "cond")
        assert len(cond) == 2

        def instead(site, q, k, v):
            assert q.shape[0] == 2
            assert q.shape[2] == site.size[0] * site.size[1]
            assert k.shape[2] == (cond.tokens.shape[1] if site.cross else q.shape[2])
            seen.add((site.layer.name, site.size, site.cross))
            return attend(q, k, v)

        return instead

    plain = drawn(pipe)
    assert torch.equal(drawn(pipe, around), plain)
    assert torch.equal(drawn(pipe), plain)
    layers = {name: each for name, each in pipe.unet.named_modules() if isinstance(each, Attention)}
    assert {name for name, _, _ in seen} == layers.keys()
    factor, deepest = pipe.vae.downscale, {size for name, size, _ in seen if name.startswith("mid_block")}
    levels = len(pipe.unet.config.block_out_channels) - 1
    assert deepest == {(32 // factor >> levels, 64 // factor >> levels)}


def test_the_last_goes_around_those_before_it(pipe):
    def times(factor):
        return lambda names, cond, base: lambda site, q, k, v: factor * base(site, q, k, v)

    def plus(names, cond, base):
        return lambda site, q, k, v: base(site, q, k, v) + 1

    def whole(site, q, k, v):
        return 2 * attend(q, k, v) + 1

    both = drawn(pipe, times(2), plus)
    assert torch.equal(both, drawn(pipe, lambda names, cond, base: whole))
    assert not torch.equal(both, drawn(pipe, plus, times(2)))


def test_one_that_changes_nothing_costs_nothing(pipe):
    job = pipe.prepare(ASKED)
    joined = Joined(("cond",), [job.encode(0)[0]], True, [lambda names, cond, base: base])
    assert joined.text(torch.float32).attend is None
