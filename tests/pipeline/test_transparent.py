"""Pictures without their plain background: through the pipeline, the command line and each format."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import ldm
from ldm import cli
from ldm.images.formats import Encoding
from ldm.images.keying import keyed
from ldm.images.pixels import to_pil
from ldm.images.png import as_bytes, read_request
from ldm.pipeline.sample import without_background

FEW = {"num_inference_steps": 2, "prompt": "a boat"}


@pytest.fixture
def plain(monkeypatch):
    """Whatever is drawn becomes a disc on blue."""
    y, x = np.mgrid[:64, :64] - 31.5
    alpha = (20.5 - np.hypot(y, x)).clip(0, 1)[..., None]
    picture = alpha * (0.8, 0.2, 0.1) + (1 - alpha) * (0.45, 0.65, 0.95)
    made = torch.from_numpy(picture).float().movedim(-1, 0)
    decode = "ldm.pipeline.networks.decode"
    monkeypatch.setattr(decode, lambda vae, latents: made.expand(len(latents), -1, -1, -1))
    return picture


def test_pictures_have_alpha_in_every_type_of_output(models, plain):
    pipe, request = models("sd1"), ldm.Request(**FEW, height=64, width=64, seeds=(1, 2), transparent=True)
    result = pipe.generate(request)
    assert [image.mode for image in result.images] == ["RGBA", "RGBA"]
    assert result.requests[0].transparent
    right = np.round(keyed(plain) * 255)
    assert np.abs(np.asarray(result.images[1]) - right).max() <= 1
    assert pipe.generate(request, output_type="pt").images.shape == (2, 4, 64, 64)
    assert pipe.generate(request, output_type="np").images.shape == (2, 64, 64, 4)
    latent = pipe.generate(request, output_type="latent")
    assert latent.requests[0].transparent is None
    assert pipe.generate(request.replace(transparent=None)).images[0].mode == "RGB"


def test_what_has_no_plain_border_stays_opaque_and_is_told(models):
    request = ldm.Request(**FEW, seeds=(7,), transparent=True)
    with pytest.warns(UserWarning, match=r"seed 7: the border of the picture is not plain.*plain blue"):
        (image,) = models("sd1").generate(request).images
    assert image.getchannel("A").getextrema() == (255, 255)
    (opaque,) = models("sd1").generate(request.replace(transparent=None)).images
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(opaque))


def test_what_a_checker_made_black_stays_black(models, plain, recwarn):
    job = models("sd1").prepare(ldm.Request(**FEW, transparent=True))
    (batch,) = job.batches
    flagged = (replace(batch[0], flagged=True),)
    (found,) = without_background(torch.zeros(1, 3, 16, 16), flagged)
    assert (found[3] == 1).all()
    assert not (found[:3]).any()
    assert not recwarn


def test_a_watermark_would_go_with_the_background(models):
    with pytest.raises(ldm.UserError, match="watermark is not allowed beside transparent"):
        models("sd1").prepare(ldm.Request(**FEW, transparent=True, watermark="ldm", height=64, width=64))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.avif"])
def test_each_format_keeps_alpha_and_its_request(folder_of, plain, tmp_path, monkeypatch, capsys, name):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    monkeypatch.chdir(tmp_path)
    model = ["-m", str(folder_of("sd1")), "--dtype", "fp32"]
    flags = [*model, "-W", "64", "-H", "64", "--steps", "2", "--transparent", "-o", name]
    assert cli.txt2img(["-p", "a boat", *flags]) == 0
    with Image.open(name) as image:
        assert image.mode == "RGBA"
        alpha = np.asarray(image.getchannel("A")) / 255
    assert np.abs(alpha - keyed(plain)[..., 3]).mean() < 0.01
    assert read_request(name).transparent
    capsys.readouterr()
    assert cli.main(["info", name]) == 0
    assert "transparent: True" in capsys.readouterr().out
    if name == "a.png":
        assert cli.main(["redraw", name, *model]) == 0
        assert capsys.readouterr().out == "equal: every pixel\n"


def test_a_jpeg_is_refused_before_and_after(folder_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["-m", str(folder_of("sd1")), "--transparent", "-o", "a.jpg"]
    assert cli.txt2img(["-p", "a boat", *flags]) == 2
    assert "a JPEG cannot be transparent: give --format png or webp" in capsys.readouterr().err
    assert not Path("a.jpg").exists()
    (image,) = to_pil(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ldm.UserError, match="a JPEG cannot be transparent"):
        as_bytes(image, None, Encoding("jpeg"))
