"""FreeU as a field of a request, against diffusers' pipeline."""

import numpy as np
import pytest
import torch

import ldm
from ldm import cli
from ldm.errors import UserError
from ldm.images.png import read_request

FACTORS = (1.3, 1.4, 0.9, 0.2)


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
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4
    assert (ours - plain).abs().max() / plain.abs().max() > 1e-3
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
