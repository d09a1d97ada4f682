"""resize_mode: how an image of another shape becomes the picture's, and its mask with it."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_folder
from torch.nn import functional as F

import ldm
from ldm.errors import UserError
from ldm.images.fitting import reshaped

ASK = {"height": 16, "width": 32, "num_inference_steps": 3, "strength": 0.7, "seed": 1, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, dtype="fp32")


def noise(width, height):
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["crop", "fill"])
def test_it_is_the_picture_of_an_image_that_was_reshaped_before(pipe, mode):
    image, mask = noise(24, 24), Image.new("L", (24, 24))
    mask.paste(255, (0, 0, 12, 24))
    for given in ({"image": image}, {"image": image, "mask_image": mask, "mask_blur": 1.0}):
        ours = pipe("sea", resize_mode=mode, **given, **ASK)
        before = {name: reshaped(each, (16, 32), mode) for name, each in given.items() if name != "mask_blur"}
        own = pipe("sea", **before, **ASK)
        stretched = pipe("sea", **given, **ASK)
        if "mask_image" not in given:
            assert torch.equal(ours.images, own.images)
        assert not torch.allclose(ours.images, stretched.images, atol=1e-3)
        assert ours.request.resize_mode == mode


def test_latents_are_resized_as_a1111_does(tmp_path):
    """Of a VAE without a distribution: the same as to encode, resize and give the latents."""
    make_folder(tmp_path / "model", vae="tiny")
    pipe, image = ldm.load(tmp_path / "model", dtype="fp32"), noise(24, 48)
    ours = pipe("sea", image=image, resize_mode="latent", **ASK).images
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    factor = pipe.vae.downscale
    latents = F.interpolate(pipe.encode(pixels).mean, (16 // factor, 32 // factor), mode="bilinear")
    assert torch.allclose(ours, pipe("sea", image=latents, **ASK).images, atol=1e-6)


def test_what_means_nothing_is_refused(pipe):
    with pytest.raises(UserError, match="resize_mode"):
        pipe("sea", resize_mode="crop", height=16, width=16)
    with pytest.raises(UserError, match="without a mask"):
        pipe(
            "sea", image=noise(16, 16), mask_image=Image.new("L", (16, 16), 255), resize_mode="latent", **ASK
        )
    with pytest.raises(UserError, match="resize, crop, fill or latent"):
        pipe("sea", image=noise(16, 16), resize_mode="stretch", **ASK)
