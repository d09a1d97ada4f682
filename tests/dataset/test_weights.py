"""Weights of latent pixels against a mask's function integrated in float64, through all that crops do."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.dataset.buckets import Batches, Variation, make_buckets, make_crop
from ldm.dataset.examine import examine
from ldm.dataset.findings import Example
from ldm.dataset.weights import Weights, weights_beside, weights_in
from ldm.errors import UserError


def subject(down, across):
    """A smooth mask of places in 0..1 of a picture: more at the upper left than elsewhere."""
    return np.exp(-6 * ((down - 0.3) ** 2 + 2 * (across - 0.25) ** 2))


def example(folder, size, name="7", alpha=False):
    """A picture of grey and its mask, in the alpha or beside it."""
    folder.mkdir(exist_ok=True)
    places = [(np.arange(side) + 0.5) / side for side in size]
    mask = np.round(255 * subject(*np.meshgrid(*places, indexing="ij"))).astype(np.uint8)
    grey = np.full(size, 90, np.uint8)
    if alpha:
        Image.fromarray(np.stack([grey, mask], -1), "LA").save(folder / f"{name}.png")
    else:
        Image.fromarray(grey).save(folder / f"{name}.png")
        Image.fromarray(mask).save(folder / f"{name}.mask.png")
    return Example(folder / f"{name}.png", "grey", size, name)


def integrated(crop, downscale, fine=4):
    """The mean of `subject` over each latent pixel, by many points in it."""
    height, width = crop.size
    down = (np.arange(height * fine) + 0.5) / fine + crop.top
    across = (np.arange(width * fine) + 0.5) / fine + crop.left
    if crop.flipped:  # places are those of the mirrored picture
        across = crop.resized[1] - across
    values = subject(*np.meshgrid(down / crop.resized[0], across / crop.resized[1], indexing="ij"))
    block = downscale * fine
    return values.reshape(height // downscale, block, width // downscale, block).mean((1, 3))


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (128, 256), (100, 150), (333, 210), (40, 40)])
def test_a_weight_is_the_mean_of_the_mask_over_a_latent_pixel(tmp_path, size, alpha):
    shown = example(tmp_path, size, alpha=alpha)
    made = Weights(alpha=True) if alpha else weights_beside([shown], 0.0)
    for at, flipped in ((None, False), (None, True), ((0.9, 0.1), False), ((0.2, 0.8), True)):
        for bucket in ((64, 64), (48, 80)):
            crop = make_crop(size, bucket, at, flipped)
            weights = made.of(shown, crop, 8)
            assert weights.shape == (bucket[0] // 8, bucket[1] // 8)
            expected = torch.from_numpy(integrated(crop, 8))
            near = 0.04 if min(size) < 64 else 0.01  # a mask that is enlarged keeps its own steps
            torch.testing.assert_close(weights.double(), expected, rtol=0, atol=near)


def test_where_pixels_fit_it_is_exact(tmp_path):
    """A mask of 0 and 255 in blocks that cut latent pixels apart, halved and mirrored."""
    mask = np.zeros((128, 192), np.uint8)
    mask[24:80, 40:100] = 255
    Image.fromarray(mask).save(tmp_path / "7.mask.png")
    Image.new("RGB", (192, 128)).save(tmp_path / "7.png")
    shown = Example(tmp_path / "7.png", "", (128, 192), "7")
    crop = make_crop((128, 192), (64, 64), flipped=True)
    assert (crop.resized, crop.left) == ((64, 96), 16)
    mirrored = mask[:, ::-1][:, 32:160] / 255
    expected = 0.25 + 0.75 * mirrored.reshape(8, 16, 8, 16).mean((1, 3))
    made = weights_beside([shown], 0.25).of(shown, crop, 8)
    torch.testing.assert_close(made.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_each_picture_of_a_batch_has_its_own(tmp_path):
    shown = [
        example(tmp_path, size, str(i)) for i, size in enumerate([(64, 64), (96, 64), (64, 96), (80, 56)])
    ]
    made = weights_beside(shown, 0.1)
    batches = Batches(shown, [make_buckets(64)], 1, 0, Variation(random_crop=True, random_flip=True))
    flips = set()
    for step in range(16):
        (row,) = batches.at(step)
        expected = 0.1 + 0.9 * integrated(row.crop, 8)
        torch.testing.assert_close(
            made.of(row.example, row.crop, 8).double(), torch.from_numpy(expected), rtol=0, atol=0.01
        )
        flips.add(row.crop.flipped)
    assert flips == {False, True}


def test_what_has_no_mask_counts_as_a_whole(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "7.png")
    shown = Example(tmp_path / "7.png", "", (64, 64), "7")
    crop = make_crop((64, 64), (64, 64))
    for made in (Weights(0.5), Weights(0.5, alpha=True)):
        assert torch.equal(made.of(shown, crop, 8), torch.ones(8, 8))


# --- files -----------------------------------------------------------------------------------------------


def test_masks_are_no_pictures_and_are_told(tmp_path):
    example(tmp_path, (64, 64), "7")
    Image.new("L", (64, 64)).save(tmp_path / "8-masklabel.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "8.jpg")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "alone.mask.png")  # of no picture: one itself
    examined = examine(tmp_path, instance_prompt="grey")
    assert sorted(each.path.name for each in examined.examples) == ["7.png", "8.jpg", "alone.mask.png"]
    told = [finding.text for finding in examined.findings if finding.kind == "masks"]
    assert told == ["2 masks beside pictures, such as 7.mask.png: read with --masked_loss"]
    files = weights_beside([each for each in examined.examples if "alone" not in each.path.name], 0).files
    assert [path.name for path in files.values()] == ["7.mask.png", "8-masklabel.png"]


def test_masks_of_a_folder_go_by_place_and_name(tmp_path):
    (tmp_path / "data" / "cats").mkdir(parents=True)
    shown = example(tmp_path / "data" / "cats", (64, 96))
    masks = tmp_path / "masks"
    (masks / "cats").mkdir(parents=True)
    (tmp_path / "data" / "cats" / "7.mask.png").rename(masks / "cats" / "7.webp")
    made = weights_in(masks, [shown], tmp_path / "data", 0.0)
    crop = make_crop((64, 96), (64, 64))
    torch.testing.assert_close(
        made.of(shown, crop, 8).double(), torch.from_numpy(integrated(crop, 8)), rtol=0, atol=0.01
    )
    before = made.fingerprint
    Image.new("L", (96, 64)).save(masks / "cats" / "7.webp")
    assert weights_in(masks, [shown], tmp_path / "data", 0.0).fingerprint != before


def test_what_is_wrong_with_masks_is_told_in_one_line(tmp_path):
    shown = example(tmp_path, (64, 64))
    Image.new("L", (64, 32)).save(tmp_path / "7.mask.png")
    with pytest.raises(UserError, match=r"7\.mask\.png is 64 x 32 pixels, but .*7\.png 64 x 64: give"):
        weights_beside([shown], 0).of(shown, make_crop((64, 64), (64, 64)), 8)
    (tmp_path / "7.mask.png").unlink()
    with pytest.raises(UserError, match=r"masked_loss: no mask of .*7\.png: write 7\.mask\.png, white where"):
        weights_beside([shown], 0)
    with pytest.raises(UserError, match=r"mask_data_dir .*nowhere is no folder: give the one of masks"):
        weights_in(tmp_path / "nowhere", [shown], tmp_path, 0)
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match=r"masks has no mask for 7\.png: give each one of its name"):
        weights_in(tmp_path / "masks", [shown], tmp_path, 0)
