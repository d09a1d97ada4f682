"""Models that draw from pictures: batches, seeds, files, masks, defaults, and what they refuse."""

import copy
import hashlib
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import make_family

import ldm
from ldm import cli
from ldm.checkpoint import Defaults
from ldm.images.fitting import fit_image, fit_mask, read_file, take
from ldm.models.kind import Kind
from ldm.pipeline.resolve import size_from

SIZE = (16, 16)


def picture(height=16, width=16, seed=1):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def mask(height=16, width=16):
    levels = np.zeros((height, width), dtype=np.uint8)
    levels[5:, : width // 2] = 255
    return Image.fromarray(levels)


INPUTS = {
    "sd1": {"image": picture(), "strength": 0.7},
    "sdxl": {},
    "refiner": {"image": picture(), "strength": 0.7},
    "inpaint": {"image": picture(), "mask_image": mask()},
    "inpaint_xl": {"image": picture(), "mask_image": mask(), "strength": 0.7},
    "pix2pix": {"image": picture()},
    "upscaler": {"image": picture(8, 8)},
    "lcm": {},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            make_family(name, made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def models(folder_of):
    """Our pipelines by family."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = ldm.load(folder_of(name), device="cpu", dtype="fp32")
        return made[name]

    return get


def latents(pipe, prompt="the red boat", **arguments):
    return pipe(prompt, **{"num_inference_steps": 3, "output_type": "latent", **arguments}).images


def error(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


# --- batches and seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde"])
@pytest.mark.parametrize("family", INPUTS)
def test_a_batch_equals_its_pictures_drawn_alone(models, family, sampler):
    pipe = models(family)
    common = {**INPUTS[family], "sampler": sampler}
    batch = latents(pipe, num_images_per_prompt=3, seed=1, **common)
    alone = torch.cat([latents(pipe, seed=seed, **common) for seed in (1, 2, 3)])
    assert error(batch, alone) < 1e-5
    assert error(batch[:1], batch[1:2]) > 1e-2


@pytest.mark.parametrize("family", ["sdxl", "inpaint_xl"])
def test_prompts_of_different_lengths_do_not_change_each_other(models, family):
    pipe, long = models(family), "the red boat at sea " * 5
    prompts, negatives = ["the red boat", long, "sea"], [None, "sea", "boat"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = latents(pipe, prompts, negative_prompt=negatives, seed=[4, 2, 9], **INPUTS[family])
        alone = [
            latents(pipe, prompt, negative_prompt=negative, seed=seed, **INPUTS[family])
            for prompt, negative, seed in zip(prompts, negatives, [4, 2, 9], strict=True)
        ]
    assert error(batch, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("family", ["refiner", "inpaint_xl"])
def test_half_precision_gives_the_same_picture_nearly(models, family):
    """Sizes and noise levels stay exact, whatever the U-Net's dtype."""
    pipe = models(family)
    parts = pipe.parts
    runtime = replace(pipe.runtime, dtype=torch.bfloat16)
    reload = {
        name: runtime.place(copy.deepcopy(getattr(parts, name))) for name in ("unet", "vae", "text_encoder_2")
    }
    if parts.text_encoder is not None:
        reload["text_encoder"] = runtime.place(copy.deepcopy(parts.text_encoder))
    half = ldm.Pipeline.from_parts(replace(parts, **reload), runtime)
    common = {**INPUTS[family], "original_size": (1025, 1027), "seed": 1}
    assert error(latents(half, **common), latents(pipe, **common)) < 0.1


def test_given_latents_are_the_noise(models):
    pipe = models("sd1")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    common = {"image": picture(), "strength": 0.7, "sampler": "euler"}
    one, other = (latents(pipe, latents=noise, seed=seed, **common) for seed in (1, 2))
    assert error(one, other) < 0.5  # they still differ in the VAE's sample
    assert error(latents(pipe, latents=-noise, seed=1, **common), one) > 0.5


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["inpaint", "inpaint_xl"])
def test_pixels_outside_the_mask_are_untouched(models, family):
    (drawn,) = models(family)("sea", num_inference_steps=2, seed=1, **INPUTS[family]).images
    same = np.asarray(drawn) == np.asarray(picture())
    kept = np.asarray(mask()) == 0
    assert same[kept].all()
    assert same[~kept].mean() < 0.1


def test_only_what_is_painted_on_a_transparent_mask_is_drawn_anew(models):
    painted = Image.new("RGBA", (16, 16))
    painted.paste((0, 0, 0, 255), (4, 4, 12, 12))
    (drawn,) = models("inpaint")("sea", num_inference_steps=2, image=picture(), mask_image=painted).images
    same = (np.asarray(drawn) == np.asarray(picture())).all(axis=2)
    assert same[np.asarray(painted)[..., 3] == 0].all()
    assert same[4:12, 4:12].mean() < 0.1


@pytest.mark.parametrize(("size", "warns"), [((16, 16), False), ((32, 32), False), ((16, 32), True)])
def test_a_mask_of_another_shape_is_told_with_both_sizes(models, tmp_path, size, warns):
    picture().save(tmp_path / "photo.png")
    mask(*size).save(tmp_path / "mask.png")
    files = {"image": tmp_path / "photo.png", "mask_image": tmp_path / "mask.png"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        models("inpaint")("sea", num_inference_steps=2, **files)
    told = [str(each.message) for each in told if "mask" in str(each.message)]
    assert bool(told) == warns
    assert all("mask.png has 32x16 pixels and the picture it masks 16x16" in line for line in told)


def test_mask_is_cut_in_the_middle():
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert fit_mask(grey, (1, 4)).flatten().tolist() == [0, 0, 1, 1]
    assert fit_mask(grey.convert("RGB"), (1, 4)).flatten().tolist() == [0, 0, 1, 1]
    assert fit_mask(take(torch.tensor([[0.0, 0.49, 0.5, 1.0]]), 1), (1, 4)).flatten().tolist() == [0, 0, 1, 1]


# --- sizes -----------------------------------------------------------------------------------------------


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


def test_a_size_that_is_asked_for_makes_up_for_a_small_image(models):
    images = models("sd1")("sea", image=picture(7, 7), num_inference_steps=2, height=16, width=8).images
    assert images[0].size == (8, 16)


def test_a_file_of_an_impossible_size_is_named(models, tmp_path):
    picture(7, 7).save(tmp_path / "tiny.png")
    with pytest.raises(ldm.UserError, match=r"tiny\.png has 7x7 pixels, too small .*; -W and -H"):
        models("sd1")("sea", image=tmp_path / "tiny.png")


def test_asked_size_wins(models):
    images = models("upscaler")("sea", image=picture(8, 8), num_inference_steps=2, height=48, width=32).images
    assert images[0].size == (32, 48)
    images = models("pix2pix")("sea", image=picture(40, 24), num_inference_steps=2, width=8).images
    assert images[0].size == (8, 40)


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


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def drawn_from_files(models, tmp_path):
    """A picture's request, and the files that it was drawn from."""
    picture().save(tmp_path / "photo.png")
    mask().save(tmp_path / "mask.png")
    files = {"image": tmp_path / "photo.png", "mask_image": tmp_path / "mask.png"}
    return models("inpaint")("sea", num_inference_steps=2, seed=3, **files)


def test_a_picture_of_files_is_drawn_again_from_its_request(models, tmp_path, drawn_from_files):
    request = drawn_from_files.request
    assert request.image == str(tmp_path / "photo.png")
    assert request.image_sha256 == hashlib.sha256((tmp_path / "photo.png").read_bytes()).hexdigest()
    again = models("inpaint").generate(ldm.Request.from_json(request.to_json()))
    assert np.array_equal(again.images[0], drawn_from_files.images[0])
    in_memory = models("inpaint")("sea", num_inference_steps=2, seed=3, image=picture(), mask_image=mask())
    assert np.array_equal(in_memory.images[0], drawn_from_files.images[0])


@pytest.mark.parametrize("name", ["photo.png", "mask.png"])
def test_a_changed_file_is_refused_by_name(models, tmp_path, drawn_from_files, name):
    picture(seed=2).save(tmp_path / name)
    with pytest.raises(ldm.UserError, match=f"{name} has changed"):
        models("inpaint").generate(drawn_from_files.request)


def test_a_moved_file_is_found_where_one_says(models, tmp_path, drawn_from_files):
    shutil.move(tmp_path / "photo.png", tmp_path / "moved.png")
    with pytest.raises(ldm.UserError, match=r"cannot read the picture .*photo.png: No such file"):
        models("inpaint").generate(drawn_from_files.request)
    moved = drawn_from_files.request.replace(image=str(tmp_path / "moved.png"))
    again = models("inpaint").generate(moved)
    assert np.array_equal(again.images[0], drawn_from_files.images[0])


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


# --- defaults --------------------------------------------------------------------------------------------


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


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("inpaint", {}, "draws from an image .inpaint.: give one"),
        ("inpaint", {"image": picture()}, "what a mask covers: give one"),
        ("pix2pix", {}, "draws from an image .pix2pix."),
        ("upscaler", {}, "draws from an image .upscale."),
        (
            "sd1",
            {"image": picture(), "mask_image": mask()},
            "mask_image .* only inpainting models, .* 9 channels",
        ),
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


def test_nan_in_the_encoder_never_becomes_a_picture(models):
    broken = replace(models("sd1").parts, vae=copy.deepcopy(models("sd1").vae))
    with torch.no_grad():
        broken.vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the VAE's encoder gives NaN"):
        latents(ldm.Pipeline.from_parts(broken), image=picture())


@pytest.mark.parametrize("family", ["refiner", "inpaint", "lcm"])
def test_nan_in_half_precision_is_redone_in_fp32(folder_of, family):
    half = ldm.load(folder_of(family), device="cpu", dtype="fp16")
    with torch.no_grad():  # 1e6 inside: too much for fp16
        half.unet.time_embedding.linear_1.weight.mul_(1e3)
        half.unet.time_embedding.linear_2.weight.mul_(1e3)
    with pytest.warns(UserWarning, match="the U-Net gave NaN or Inf in float16: done again in float32"):
        drawn = latents(half, seed=1, **INPUTS[family])
    exact = ldm.Pipeline.from_parts(replace(half.parts, unet=copy.deepcopy(half.unet).float()))
    assert error(drawn, latents(exact, seed=1, **INPUTS[family])) < 1e-6


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


# --- the command line ------------------------------------------------------------------------------------


@pytest.fixture
def drawn_by_command(folder_of, tmp_path, monkeypatch):
    """Draws out.png from photo.png and mask.png, which lie beside it, and gives the model's flags."""
    monkeypatch.chdir(tmp_path)
    picture().save("photo.png")
    mask().save("mask.png")
    model = ["--model", str(folder_of("inpaint")), "--device", "cpu", "--dtype", "fp32", "--quiet"]
    asked = ["-p", "sea", "--steps", "3", "-s", "3", "-o", "out.png"]
    files = ["-i", "photo.png", "--mask", "mask.png", "--strength", "0.7"]
    assert cli.txt2img([*model, *asked, *files]) == 0
    return model


def test_the_command_draws_what_python_draws(models, drawn_by_command):
    files = {"image": "photo.png", "mask_image": "mask.png"}
    (drawn,) = models("inpaint")("sea", num_inference_steps=3, seed=3, strength=0.7, **files).images
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(drawn))


def test_a_picture_of_files_is_redrawn_and_a_changed_file_is_told(drawn_by_command, capsys):
    again = ["redraw", "out.png", *drawn_by_command]
    assert cli.main(again) == 0
    assert "equal: every pixel" in capsys.readouterr().out
    shutil.move("photo.png", "moved.png")
    assert cli.main(again) == 2
    assert "cannot read the picture photo.png" in capsys.readouterr().err
    assert cli.main([*again, "-i", "moved.png"]) == 0
    picture(seed=2).save("photo.png")
    assert cli.main(again) == 2
    assert "photo.png has changed" in capsys.readouterr().err


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


def test_a_threads_picture_is_its_own(models):
    """Image inputs, their noise and their encodings belong to a call."""
    pipe, common = models("inpaint_xl"), INPUTS["inpaint_xl"]
    one_by_one = [latents(pipe, seed=seed, **common) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: latents(pipe, seed=seed, **common), range(4)))
    assert all(error(a, b) < 1e-6 for a, b in zip(together, one_by_one, strict=True))
