"""Random masks: shares, kinds, determinism; and the same 9 channels as drawing uses."""

import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage, stats

from ldm.dataset.masks import masked_pictures, random_masks
from ldm.finetune.inpainting import inpainting_input
from ldm.train.loss_recipe import MaskSection

NOTHING = {"rectangles": 0, "strokes": 0, "whole": 0, "none": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def only(kind):
    return MaskSection(**NOTHING | {kind: 1})


def test_kinds_have_their_shares():
    masks = random_masks(3000, (16, 16), generator(), MaskSection())
    covered = masks.mean((1, 2, 3))
    counts = [int((covered == 1).sum()), int((covered == 0).sum())]
    counts.append(3000 - sum(counts))
    assert stats.chisquare(counts, [750, 150, 2100]).pvalue > 0.01


@pytest.mark.parametrize("kind", ["rectangles", "strokes"])
def test_partial_masks_cover_some_and_leave_some(kind):
    masks = random_masks(200, (64, 48), generator(), only(kind))
    assert masks.shape == (200, 1, 64, 48)
    assert set(masks.unique().tolist()) == {0, 1}
    covered = masks.mean((1, 2, 3))
    assert 0 < covered.min() < 0.1
    assert 0.45 < covered.max() < 1
    assert 0.15 < covered.mean() < 0.45
    reached = masks.mean((0, 1))
    assert reached.min() > 0.01  # every pixel is hidden sometimes
    assert torch.unique(masks.flatten(1), dim=0).shape[0] == 200


def test_rectangles_are_one_to_three_rectangles():
    masks = random_masks(100, (64, 48), generator(), only("rectangles"))[:, 0].numpy()
    seen = set()
    for mask in masks:
        labels, count = ndimage.label(mask)
        seen.add(count)
        if count == 3:  # apart from each other, so each fills its bounding box
            assert all((mask[box] == 1).all() for box in ndimage.find_objects(labels))
    assert seen == {1, 2, 3}


def test_whole_and_none_are_that():
    assert random_masks(3, (8, 8), generator(), only("whole")).min() == 1
    assert random_masks(3, (8, 8), generator(), only("none")).max() == 0


def test_masks_follow_from_the_generator():
    first, again, other = (random_masks(50, (32, 32), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shares_must_sum_to_one():
    with pytest.raises(ValidationError, match=r"sum to 1\.5: they are shares of 1"):
        MaskSection(rectangles=0.6, strokes=0.6, none=0.05)


def test_the_input_is_that_of_diffusers_inpainting():
    """StableDiffusionInpaintPipeline.prepare_mask_latents' steps, by hand."""
    pictures = torch.rand(2, 3, 32, 48, generator=generator()) * 2 - 1
    masks = random_masks(2, (32, 48), generator(), only("strokes"))
    grey = masked_pictures(pictures, masks)
    assert torch.equal(grey, pictures * (masks < 0.5))
    noisy, hidden = torch.randn(2, 2, 4, 4, 6, generator=generator())
    made = inpainting_input(noisy, masks, hidden)
    assert made.shape == (2, 9, 4, 6)
    assert torch.equal(made[:, :4], noisy)
    assert torch.equal(made[:, 4:5], masks[:, :, ::8, ::8])
    assert torch.equal(made[:, 5:], hidden)
