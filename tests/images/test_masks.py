"""Masks made ready."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ldm.images.masks import crop_region, extended, feathered, filled, pasted, shaped


def box_mask(left, top, right, bottom, size=(64, 48)):
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


@pytest.mark.parametrize("padding", [0, 3, 32])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32), (24, 40)])
@pytest.mark.parametrize(
    "box", [(10, 12, 20, 16), (0, 0, 5, 40), (60, 44, 64, 48), (0, 0, 64, 48), (30, 20, 31, 21)]
)
def test_the_region_of_a_mask_is_that_of_diffusers(box, size, padding):
    mask = box_mask(*box)
    want = VaeImageProcessor.get_crop_region(mask, width=size[1], height=size[0], pad=padding)
    assert crop_region(mask, size, padding) == want


def test_a_mask_that_covers_nothing_has_no_region():
    assert crop_region(Image.new("L", (8, 8)), (8, 8), 2) is None


@pytest.mark.parametrize("grow", [1, 5, 19, -1, -3])
def test_a_mask_grows_to_each_side(grow):
    mask = box_mask(20, 20, 36, 30)
    grown = shaped(mask, invert=False, grow=grow, soft=False)
    assert grown.getbbox() == (20 - grow, 20 - grow, 36 + grow, min(30 + grow, 48))
    assert set(np.unique(np.asarray(grown))) == {0, 255}


def test_inverting_comes_before_growing_and_greys_are_cut():
    grey = Image.fromarray(np.array([[0, 100, 127, 128, 200, 255]], dtype=np.uint8))
    assert np.asarray(shaped(grey, False, 0, False)).tolist() == [[0, 0, 0, 255, 255, 255]]
    assert np.asarray(shaped(grey, True, 0, False)).tolist() == [[255, 255, 255, 0, 0, 0]]
    assert np.asarray(shaped(grey, True, 0, True)).tolist() == [[255, 155, 128, 127, 55, 0]]
    assert np.asarray(shaped(grey, True, 1, False)).tolist() == [[255, 255, 255, 255, 0, 0]]


def test_an_extended_picture_holds_the_old_one_and_a_mask_of_the_rest():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    given = Image.new("L", (5, 6))
    given.putpixel((1, 2), 255)
    large, mask = extended(image, given, (1, 2, 3, 4))
    assert large.size == mask.size == (9, 12)
    assert np.array_equal(np.asarray(large)[2:8, 1:6], np.asarray(image))
    covered = np.ones((12, 9), bool)
    covered[2:8, 1:6] = np.asarray(given) > 0
    assert np.array_equal(np.asarray(mask) > 0, covered)


def test_what_is_hidden_continues_what_is_around_it():
    """A picture of one colour is that colour throughout; a ramp goes on between its ends."""
    flat, mask = torch.full((1, 3, 13, 11), 0.3), torch.zeros(1, 1, 13, 11)
    mask[..., 3:9, 2:8] = 1
    torch.testing.assert_close(filled(flat.where(mask == 0, torch.tensor(0.9)), mask), flat)
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 12:20] = 1
    found = filled(ramp.where(mask == 0, torch.tensor(0.0)), mask)
    assert torch.equal(found[..., :12], ramp[..., :12])
    assert 0.3 < float(found[..., 12:20].min()) < float(found[..., 12:20].max()) < 0.7
    assert torch.equal(filled(ramp, torch.ones(1, 1, 32, 32)), torch.full((1, 3, 32, 32), 0.5))


def test_what_is_pasted_is_what_diffusers_overlay_makes():
    rng = np.random.default_rng(1)
    whole = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    drawn = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    share = feathered(box_mask(20, 14, 40, 30), 3.0)
    box = crop_region(share, (32, 32), 4)
    peer = VaeImageProcessor().apply_overlay(share, whole, drawn, box)
    tensors = [torch.from_numpy(np.array(each)).float() / 255 for each in (drawn, whole, share)]
    ours = pasted(
        tensors[0].movedim(-1, 0)[None], tensors[1].movedim(-1, 0)[None], tensors[2][None, None], box
    )
    levels = (ours[0].movedim(0, -1).numpy() * 255).round().astype(int) - np.asarray(peer).astype(int)
    assert np.abs(levels).max() <= 1  # it rounds alpha on the way
    kept = np.asarray(share) == 0
    assert not levels[kept].any()


def test_where_nothing_mixes_either_ones_bits_are_kept():
    images, picture = torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)
    share = torch.zeros(1, 1, 8, 8)
    share[..., :3], share[..., 3] = 1, 0.25
    found = pasted(images, picture, share, None)
    assert torch.equal(found[..., :3], images[..., :3])
    assert torch.equal(found[..., 4:], picture.expand(2, -1, -1, -1)[..., 4:])
    torch.testing.assert_close(found[..., 3], 0.25 * images[..., 3] + 0.75 * picture[..., 3])
