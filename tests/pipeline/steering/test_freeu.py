"""FreeU as a field of a request, against diffusers' pipeline."""

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import fourier_filter

import ldm
from ldm import cli
from ldm.errors import UserError
from ldm.images.png import read_request
from ldm.models import build
from ldm.models.attention import Context
from ldm.pipeline.steering.freeu import FreeU, low_frequencies

FACTORS = (1.3, 1.4, 0.9, 0.2)
ASKED = FreeU(*FACTORS)


def relative_error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_it_draws_diffusers_picture(families, models, name):
    _, peer = families(name)
    pipe = models(name)
    few = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 4.0, "negative_prompt": "sea"}
    job = pipe.prepare(ldm.Request())
    few["latents"] = torch.randn(1, *job.start.shape, generator=torch.Generator().manual_seed(3))
    plain = pipe("red boat", **few).images
    b1, b2, s1, s2 = FACTORS
    peer.enable_freeu(b1=b1, b2=b2, s1=s1, s2=s2)
    try:
        theirs = torch.as_tensor(np.asarray(peer("red boat", **few).images))
    finally:
        peer.disable_freeu()
    ours = pipe("red boat", freeu=FACTORS, **few).images
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(ours, plain) > 1e-3
    assert torch.equal(pipe("red boat", **few).images, plain)


def test_flag_and_metadata(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["txt2img", "-p", "sea", "--freeu", "1.3,1.4,.9,.2", "--steps", "1", "-W", "32", "-H", "32", "-q"]
    assert cli.main([*argv, "-o", "a.png", "--dtype", "fp32"]) == 0
    assert read_request("a.png").freeu == FACTORS
    with pytest.raises(SystemExit):
        cli.main(["txt2img", "-p", "sea", "--freeu", "1,2", "-q"])
    assert "b1,b2,s1,s2" in capsys.readouterr().err
    with pytest.raises(UserError, match="four numbers above 0"):
        ldm.Request(freeu=(1, 1, 1, 0))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (2, 6), (1, 3), (1, 1)])
def test_the_filter_is_diffusers(size):
    x = torch.randn(2, 3, *size)
    assert torch.allclose(low_frequencies(x, 0.2), fourier_filter(x, threshold=1, scale=0.2), atol=1e-6)
    assert low_frequencies(x.bfloat16(), 0.2).dtype is torch.bfloat16


def test_a_unet_with_it_is_diffusers_and_without_it_what_it_was(reference_unet):
    theirs = reference_unet()
    ours = build({"_class_name": "UNet2DConditionModel"} | dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, tokens = torch.randn(2, 4, 12, 8), torch.tensor([700, 3]), torch.randn(2, 5, 24)
    with torch.no_grad():
        plain = theirs(x, t, tokens).sample
        theirs.enable_freeu(s1=ASKED.s1, s2=ASKED.s2, b1=ASKED.b1, b2=ASKED.b2)
        freed = theirs(x, t, tokens).sample
        mine = ours(x, t, Context(tokens, meet=ASKED))
        assert relative_error(mine, freed) < 1e-5
        assert relative_error(ours(x, t, tokens), plain) < 1e-5
        assert relative_error(plain, freed) > 1e-2
        whole, deep = ours.from_deep(x, t, Context(tokens, meet=ASKED), 0)
        assert torch.equal(whole, mine)
        again, _ = ours.from_deep(x, t, Context(tokens, meet=ASKED), 0, deep)
        assert torch.allclose(again, mine, atol=1e-6)
        one = ours(x[1:], t[1:], Context(tokens[1:], meet=ASKED))
        assert torch.allclose(one, mine[1:], atol=1e-5)
