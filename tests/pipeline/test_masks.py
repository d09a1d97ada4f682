"""What is done to a mask and the picture beneath it, through the pipeline; and the noise of other seeds."""

import numpy as np
import pytest
import torch
from family_inputs import mask, picture
from PIL import Image

import ldm
from ldm.diffusion.noise import Noise

COMMON = {"prompt": "sea", "num_inference_steps": 3}


def levels(image):
    return np.asarray(image, dtype=int)


@pytest.fixture(params=["sd1", "inpaint"])
def pipe(models, request):
    return models(request.param)


def test_an_extended_picture_keeps_every_pixel_it_had(pipe):
    (drawn,) = pipe(**COMMON, image=picture(), extend=(8, 0, 16, 8), seed=3).images
    assert drawn.size == (40, 24)
    assert np.array_equal(levels(drawn)[:16, 8:24], levels(picture()))
    new = np.ones((24, 40), bool)
    new[:16, 8:24] = False
    assert levels(drawn)[new].std() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"mask_invert": True},
        {"mask_grow": 3},
        {"mask_grow": -2},
        {"mask_blur": 2.0},
        {"mask_fill": "blur", "strength": 0.6},
        {"mask_fill": "noise", "strength": 0.6},
        {"mask_fill": "nothing", "strength": 0.6},
        {"padding_mask_crop": 2, "height": 16, "width": 24},
        {"extend": (8, 8, 8, 8), "mask_grow": 2},
    ],
)
def test_each_option_is_kept_and_changes_the_picture(pipe, tmp_path, options):
    picture().save(tmp_path / "photo.png")
    files = {"image": tmp_path / "photo.png", "mask_image": tmp_path / "mask.png"}
    mask().save(files["mask_image"])
    drawn = pipe(**COMMON, **files, **options, seed=3)
    again = pipe.generate(ldm.Request.from_json(drawn.request.to_json()))
    assert np.array_equal(levels(drawn.images[0]), levels(again.images[0]))
    plain = pipe(**COMMON, **files, strength=options.get("strength"), seed=3)
    assert not np.array_equal(levels(drawn.images[0]), levels(plain.images[0]))


def test_greys_of_a_soft_mask_are_strengths(models):
    grey = Image.new("L", (16, 16), 125)  # 0.49: kept in the states of steps 0 to 4, moved by the last 4
    call = COMMON | {"num_inference_steps": 8, "image": picture(), "output_type": "latent", "seed": 3}
    call["sampler"] = "ddim"  # which remembers nothing of the steps before
    soft = models("sd1")(**call, mask_image=grey, soft_mask=True, strength=1.0).images
    white = Image.new("L", (16, 16), 255)
    half = models("sd1")(**call, mask_image=white, strength=0.5).images
    torch.testing.assert_close(soft, half, rtol=1e-5, atol=1e-5)


def test_a_white_soft_mask_is_a_hard_one(models):
    call = COMMON | {"image": picture(), "mask_image": mask(), "seed": 3, "output_type": "pt"}
    assert torch.equal(models("sd1")(**call, soft_mask=True).images, models("sd1")(**call).images)


def test_a_feathered_edge_mixes_and_the_rest_is_untouched(pipe):
    call = COMMON | {"image": picture(48, 48), "seed": 3}
    hidden = Image.new("L", (48, 48))
    hidden.paste(255, (16, 16, 32, 32))
    (drawn,) = pipe(**call, mask_image=hidden, mask_blur=2.0).images
    far = np.ones((48, 48), bool)
    far[8:40, 8:40] = False
    assert np.array_equal(levels(drawn)[far], levels(picture(48, 48))[far])
    assert not np.array_equal(levels(drawn)[13:16, 16:32], levels(picture(48, 48))[13:16, 16:32])


def test_pictures_of_a_batch_are_those_drawn_alone(pipe):
    call = COMMON | {"image": picture(), "mask_image": mask(), "padding_mask_crop": 2, "mask_blur": 1.0}
    call |= {"height": 16, "width": 16, "noise": "gpu"}
    together = pipe(**call, num_images_per_prompt=2, seed=3).images
    for k, image in enumerate(together):
        assert np.array_equal(levels(image), levels(pipe(**call, seed=3 + k).images[0]))


def test_only_masked_is_drawn_at_the_models_own_size(models):
    pipe = models("sd1")
    job = pipe.prepare(
        ldm.Request(prompt="sea", padding_mask_crop=2),
        ldm.pipeline.inputs.Inputs(image=picture(40, 40), mask_image=mask(40, 40)),
    )
    side = pipe.unet.config.sample_size * pipe.vae.downscale
    assert job.request.size == (side, side)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_blur": 2.0}, "mask_blur is about a picture"),
        ({"image": picture(), "mask_grow": 2}, "mask_grow is about a mask"),
        ({"extend": (8, 0, 0, 0)}, "extend is about a picture"),
        ({"image": picture(), "extend": (3, 0, 0, 0)}, "19 x 16 pixels.* the nearest is 16 x 16"),
        ({"image": picture(), "mask_image": Image.new("L", (16, 16))}, "the mask covers nothing"),
        ({"image": picture(), "mask_image": mask(), "mask_grow": -9}, "the mask covers nothing"),
        ({"image": picture(), "mask_image": mask(), "mask_blur": float("nan")}, "mask_blur nan is not"),
        ({"image": picture(), "mask_image": mask(), "mask_fill": "sand"}, "mask_fill 'sand' is not allowed"),
        ({"image": [picture(), picture()], "mask_image": mask(), "mask_grow": 1}, "one picture"),
        ({"variation_strength": 0.5}, "give one"),
        ({"variation_seed": 5}, "needs variation_strength"),
        ({"seed_resize": (16, -1)}, "seed_resize .* is not allowed"),
        ({"noise": "nvidia"}, "noise 'nvidia' is not allowed: it must be cpu or gpu"),
    ],
)
def test_bad_input_is_told(models, given, message):
    with pytest.raises(ldm.UserError, match=message):
        models("sd1")(**COMMON, **given, seed=1)


def test_a_part_that_is_put_back_is_not_enlarged(models):
    pipe = models("sd1").with_upscaler(models("upscaler"))
    given = {"image": picture(), "mask_image": mask(), "padding_mask_crop": 2, "height": 16, "width": 16}
    with pytest.raises(ldm.UserError, match="padding_mask_crop is not allowed beside an upscaler"):
        pipe(**COMMON, **given, seed=1)


def test_a_soft_mask_is_for_models_that_know_of_none(models):
    given = {"image": picture(), "mask_image": mask(), "soft_mask": True}
    with pytest.raises(ldm.UserError, match="soft_mask is not allowed here"):
        models("inpaint")(**COMMON, **given, seed=1)


@pytest.mark.parametrize(
    ("options", "noise"),
    [
        ({"noise": "gpu"}, {"gpu": True}),
        ({"variation_seed": 9, "variation_strength": 0.3}, {"variation": 9, "share": 0.3}),
        ({"seed_resize": (32, 8)}, {"drawn_at": (16, 4)}),
    ],
)
def test_a_picture_begins_with_the_noise_that_was_asked_for(models, options, noise):
    from ldm.diffusion.noise import Seed

    pipe = models("sd1")
    job = pipe.prepare(ldm.Request(prompt="sea", num_inference_steps=2, seeds=(5,), **options))
    wanted = Noise([Seed(5, **noise)]).first(job.start.shape)
    plain = {"prompt": "sea", "num_inference_steps": 2, "output_type": "pt"}
    by_hand = pipe(**plain, latents=wanted, seed=5).images
    assert torch.equal(pipe(**plain, seed=5, **options).images, by_hand)
