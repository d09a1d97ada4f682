"""What a request is filled in with, by the model and by the image, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from family_inputs import INPUTS, mask, picture
from PIL import Image

import ldm
from ldm import cli
from ldm.checkpoint import Defaults
from ldm.models.kind import Kind
from ldm.pipeline.deciding.resolve import size_from
from ldm.pipeline.inputs import Inputs
from ldm.prompts.world import World


@pytest.mark.parametrize(
    ("kind", "factor", "given", "drawn"),
    [
        (Kind.TEXT, 8, (519, 512), (512, 512)),
        (Kind.INPAINT, 2, (31, 16), (24, 16)),
        (Kind.UPSCALE, 4, (130, 67), (512, 256)),
        (Kind.TEXT, 32, (70, 64), (64, 64)),
    ],
)
def test_size_of_the_picture_is_the_images(kind, factor, given, drawn):
    assert size_from(given, kind, factor) == drawn


@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner", "inpaint"])
def test_what_a_mask_covers_is_drawn_anew_whole_unless_a_strength_is_said(models, family):
    given = Inputs(image=picture(), mask_image=mask())
    job = models(family).prepare(ldm.Request(num_inference_steps=3), given)
    assert job.request.strength == 1
    assert len(job.grid.timesteps) == 3


def test_asked_size_wins(models):
    images = models("upscaler")("sea", image=picture(8, 8), num_inference_steps=2, height=48, width=32).images
    assert images[0].size == (32, 48)
    images = models("pix2pix")("sea", image=picture(40, 24), num_inference_steps=2, width=8).images
    assert images[0].size == (8, 40)


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("sd1", {"num_inference_steps": 50, "guidance_scale": 7.5, "strength": 0.8}),
        ("sdxl", {"num_inference_steps": 50, "guidance_scale": 5.0, "strength": None}),
        ("refiner", {"strength": 0.3, "aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}),
        ("inpaint", {"num_inference_steps": 50, "guidance_scale": 7.5, "strength": 1.0}),
        ("pix2pix", {"num_inference_steps": 100, "guidance_scale": 7.5, "image_guidance_scale": 1.5}),
        ("upscaler", {"num_inference_steps": 75, "guidance_scale": 9.0, "noise_level": 20}),
        ("lcm", {"num_inference_steps": 4, "guidance_scale": 8.5}),
    ],
)
def test_defaults_are_those_of_diffusers(models, tmp_path, family, wanted):
    fields = {}
    for name in ("image", "mask_image"):
        if name in INPUTS[family]:
            INPUTS[family][name].save(tmp_path / f"{name}.png")
            fields[name] = str(tmp_path / f"{name}.png")
    full = models(family).resolve(ldm.Request(**fields))
    assert {name: getattr(full, name) for name in wanted} == wanted
    own = replace(models(family).parts, defaults=Defaults(guidance_scale=3.0))
    full = ldm.Pipeline.from_parts(own).resolve(ldm.Request(**fields))
    assert full.guidance_scale == 3.0
    assert full.num_inference_steps == wanted.get("num_inference_steps", 50)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("inpaint", {}, "draws from an image .inpaint.: give one"),
        ("inpaint", {"image": picture()}, "what a mask covers: give one"),
        ("pix2pix", {}, "draws from an image .pix2pix."),
        ("upscaler", {}, "draws from an image .upscale."),
        (
            "pix2pix",
            {"image": picture(), "mask_image": mask()},
            "mask_image is not allowed here: only text-to-image and inpainting models, with an image, can",
        ),
        ("upscaler", {"image": picture(8, 8), "mask_image": mask(8, 8)}, "mask_image .* only text-to-image"),
        ("sd1", {"mask_image": mask()}, "mask_image .* with an image, can use it"),
        ("sd1", {"strength": 0.5}, "strength is not allowed here"),
        ("sd1", {"image": picture(), "strength": 0.1}, "strength 0.1 of 3 steps leaves none"),
        ("sd1", {"image": torch.zeros(3, 4)}, r"an image of shape \[3, 4\] is not allowed"),
        ("sd1", {"image": torch.full((3, 16, 16), 2.0)}, "must lie in 0..1"),
        ("sd1", {"image": torch.full((3, 16, 16), torch.nan)}, "must lie in 0..1"),
        ("sd1", {"image": picture(4, 16)}, "the image has 16x4 pixels, too small for a picture"),
        ("sd1", {"image": picture(7, 7)}, r"the image has 7x7 pixels, too small .* \(here 0x0\)"),
        ("sd1", {"image": picture(4104, 64)}, "the image has 64x4104 pixels, too large for a picture"),
        ("sd1", {"image": picture(7, 16), "width": 16}, "the image has 16x7 pixels, too small"),
        ("upscaler", {"image": picture(8, 2056)}, r"2056x8 pixels, too large .* \(here 8224x32\)"),
        ("pix2pix", {"image": torch.zeros(3, 16, 5)}, "the image has 5x16 pixels, too small"),
        ("sd1", {"eta": 0.5, "sampler": "heun"}, r"eta 0\.5 is not allowed here: heun has none"),
        ("sd1", {"prompt_2": "sea"}, "prompt_2 .* only models with two text encoders"),
        (
            "refiner",
            {"image": picture(), "negative_prompt_2": "sea"},
            "negative_prompt_2 .* two text encoders",
        ),
        ("sd1", {"original_size": (8, 8)}, "original_size .* only SDXL models"),
        ("sdxl", {"aesthetic_score": 6.0}, "aesthetic_score .* only SDXL refiners"),
        ("sdxl", {"noise_level": 6}, "noise_level .* only upscalers"),
        ("pix2pix", {"image": picture(), "strength": 0.5}, "strength is not allowed here"),
        (
            "inpaint",
            {**INPUTS["inpaint"], "image_guidance_scale": 1.5},
            "image_guidance_scale .* only instruct-pix2pix models",
        ),
        ("upscaler", {"image": picture(8, 8), "noise_level": 351}, "noise_level 351 .* takes 0 to 350"),
        ("sdxl", {"prompt_embeds": torch.zeros(1, 16, 64)}, "pooled_prompt_embeds must be given"),
        (
            "sd1",
            {"prompt_embeds": torch.zeros(1, 16, 24), "pooled_prompt_embeds": torch.zeros(1, 20)},
            "pooled_prompt_embeds must be given beside the embeddings to SDXL models, and to them only",
        ),
    ],
)
def test_refusals_are_one_clear_line(models, family, arguments, message):
    with pytest.raises(ldm.UserError, match=message) as caught:
        models(family)("sea", num_inference_steps=3, **arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_flags_of_sdxl_mean_what_they_do_in_python(folder_of, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(folder_of("sdxl")), "--device", "cpu", "--dtype", "fp32", "--quiet"]
    words = ["-p", "sea", "--prompt-2", "a boat", "-n", "red", "--negative_prompt_2", "the"]
    sizes = ["--original-size", "40", "24", "--crops-coords-top-left", "3", "5", "--target-size", "20", "22"]
    sizes += ["--negative_original_size", "8", "12", "--negative-target-size", "30", "31"]
    assert cli.txt2img([*model, *words, *sizes, "--steps", "2", "-s", "3", "-o", "out.png"]) == 0
    (drawn,) = models("sdxl")(
        "sea",
        prompt_2="a boat",
        negative_prompt="red",
        negative_prompt_2="the",
        original_size=(40, 24),
        crops_coords_top_left=(3, 5),
        target_size=(20, 22),
        negative_original_size=(8, 12),
        negative_target_size=(30, 31),
        num_inference_steps=2,
        seed=3,
    ).images
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(drawn))


# --- words that a model does not know ----------------------------------------------------------------------

WORLD = World(things=((("boat", "boats"),), (("sea", None),)), words={"ark": "boat", "ocean": "sea"})


@pytest.fixture
def knowing(models):
    """A model with a table, and that which it is without."""
    plain = models("sd1")
    return replace(plain, parts=replace(plain.parts, world=WORLD, words=frozenset({"a", "ocean"}))), plain


def told(job):
    """What the U-Net is told of a job's first prompt in its last step."""
    cond, uncond = job.encode(0, len(job.grid.timesteps) - 1)
    return torch.cat([cond.tokens, uncond.tokens])


def test_words_are_drawn_as_the_things_that_the_model_knows(knowing):
    model, plain = knowing
    asked = ldm.Request(
        prompt="an ark:a boat, [an (ark:1.2):two arks:0.5] AND the ocean",
        negative_prompt="Arks",
        regions=[{"box": (0, 0, 1, 1), "prompt": "an ark"}],
        num_inference_steps=4,
    )
    job = model.prepare(asked)
    assert job.request.prompt == asked.prompt
    assert job.request.drawn_as == (("ark", "boat"), ("arks", "boats"))  # an ocean it has seen
    same = asked.replace(
        prompt="a boat:a boat, [a (boat:1.2):two boats:0.5] AND the ocean",
        negative_prompt="boats",
        regions=[{"box": (0, 0, 1, 1), "prompt": "a boat"}],
    )
    assert torch.equal(told(job), told(plain.prepare(same)))
    assert not torch.equal(told(job), told(plain.prepare(asked)))
    assert plain.prepare(asked).request.drawn_as is None
    assert torch.equal(told(plain.prepare(job.request.replace(model=None, model_hash=None))), told(job))


@pytest.mark.parametrize("fields", [{"drawn_as": ()}, {"version": 3}])
def test_words_stay_as_they_are_written_where_that_is_asked_for_and_in_older_pictures(knowing, fields):
    model, plain = knowing
    asked = ldm.Request(prompt="an ark", num_inference_steps=2, **fields)
    assert model.prepare(asked).request.drawn_as == fields.get("drawn_as")
    assert torch.equal(told(model.prepare(asked)), told(plain.prepare(asked)))


def test_a_second_pass_has_words_of_its_own_which_are_drawn_alike(knowing):
    model, _ = knowing
    asked = ldm.Request(prompt="a boat", hires=ldm.Request(prompt="an ark"), num_inference_steps=2)
    job = model.prepare(asked)
    assert job.request.drawn_as == (("ark", "boat"),)
    assert torch.equal(told(job.then.job), told(job))
    assert model.prepare(job.request.replace(model=None, model_hash=None)).request == job.request


def test_an_edits_word_weights_are_of_the_words_that_are_drawn(knowing):
    model, _ = knowing
    asked = ldm.Request(
        prompt="a sea", target_prompt="an ark", word_weights={"ark": 2}, num_inference_steps=2
    )
    assert model.prepare(asked).steering.swap is not None  # it raises for a word that is not there


def test_weights_from_elsewhere_may_know_more_words(knowing):
    model, _ = knowing
    assert replace(model, parts=replace(model.parts, changes=(("vae", None),))).world == WORLD
    assert replace(model, parts=replace(model.parts, changes=(("unet", None),))).world is None
    with pytest.raises(ldm.UserError, match="drawn_as"):
        ldm.Request(drawn_as={"": "boat"})
