"""Pictures to draw from: in each form, upright, with their levels; and through the VAE and back."""

import numpy as np
import pytest
import torch
from family_inputs import error, latents, picture
from PIL import Image

import ldm
from ldm.images.fitting import fit_image, fit_mask, read_file, take

SIZE = (16, 16)


def test_images_are_taken_in_each_form(models, tmp_path):
    picture().save(tmp_path / "a.png")
    as_tensor = torch.from_numpy(np.asarray(picture()) / 255).permute(2, 0, 1).float()
    pipe = models("pix2pix")
    forms = [picture(), as_tensor, as_tensor[None], tmp_path / "a.png", str(tmp_path / "a.png")]
    drawn = [latents(pipe, image=form, seed=1) for form in forms]
    assert all(error(each, drawn[0]) < 1e-5 for each in drawn[1:])


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(8, 24).save(tmp_path / "a.png", exif=exif)
    assert read_file(str(tmp_path / "a.png"))[0].size == (8, 24)


def test_a_picture_of_memory_cannot_be_drawn_again_and_says_so(models):
    request = models("sd1")("sea", image=picture(), num_inference_steps=2).request
    with pytest.raises(ldm.UserError, match=r"strength is not allowed here: only .* with an image"):
        models("sd1").generate(request)


def test_a_file_that_is_no_picture(models, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ldm.UserError, match=r"cannot read the picture .*a.png: it is not a picture"):
        models("pix2pix")("sea", image=tmp_path / "a.png")


def test_pictures_of_16_bits_keep_their_levels_and_transparency_lies_on_white(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image, _ = read_file(tmp_path / "deep.png")
    assert (np.asarray(image)[..., 0] == levels).all()
    deep = Image.open(tmp_path / "deep.png")
    assert (np.asarray(take(deep, 3))[..., 1] == levels).all()
    assert fit_mask(take(deep, 1), (16, 16)).sum() == 128
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.asarray(take(clear, 3)).min() == 255
    with pytest.raises(ldm.UserError, match="32 bits a channel"):
        take(Image.new("F", (8, 8)), 3)


def test_an_image_through_the_vae_and_back(models):
    """`encode` scales as `decode` unscales."""
    pipe = models("sdxl")
    pixels = fit_image(picture(), SIZE)
    with torch.no_grad():
        moments = pipe.vae.encode(2 * pixels - 1)
    encoded = pipe.encode(pixels)
    assert torch.allclose(encoded.mean, moments.mean * 0.13025, atol=1e-6)
    noise = torch.randn(1, 4, 8, 8)
    assert torch.allclose(encoded.sample(noise), pipe.vae.encode_latents(2 * pixels - 1, noise), atol=1e-5)


def test_a_size_that_is_asked_for_makes_up_for_a_small_image(models):
    images = models("sd1")("sea", image=picture(7, 7), num_inference_steps=2, height=16, width=8).images
    assert images[0].size == (8, 16)


def test_a_file_of_an_impossible_size_is_named(models, tmp_path):
    picture(7, 7).save(tmp_path / "tiny.png")
    with pytest.raises(ldm.UserError, match=r"tiny\.png has 7x7 pixels, too small .*; -W and -H"):
        models("sd1")("sea", image=tmp_path / "tiny.png")
