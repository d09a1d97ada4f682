"""Editing a photo by inversion: the round trip, what is kept, each door, and what is refused."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from family_inputs import error, mask, picture
from PIL import Image
from torch.nn import functional as F

import ldm
from ldm import cli
from ldm.diffusion.guidance import CFG
from ldm.diffusion.inversion import ddim_invert
from ldm.diffusion.methods.ancestral import ancestral
from ldm.images.png import read_request
from ldm.pipeline import Inputs, networks

EVERYWHERE = Image.new("L", (16, 16), 255)
LONG = "the red boat at sea " * 6


def edit(pipe, **arguments):
    asked = {"prompt": "sea", "image": picture(), "target_prompt": "the red boat", "num_inference_steps": 6}
    return pipe(**{**asked, "seed": 1, **arguments})


def ddim_round_trip(pipe, request, inputs):
    """The latents of the picture, and those that DDIM's inversion and DDIM make of them."""
    job = pipe.prepare(request, inputs)
    start = job.start.rows([0])
    begun = start.begin(None, None, *job.encode(0, 0))
    x0, predict = begun.x, networks.predict(pipe.unet, job.grid, begun.branches)
    denoise = CFG(1.0)(predict, pipe.schedule.prediction.x0)
    noise = ddim_invert(denoise, x0, job.grid.sigmas)
    *_, step = ancestral(denoise, noise, job.grid.sigmas, None, eta=0.0)
    return x0, step.x


@pytest.mark.parametrize(("family", "steps"), [("sd1", 10), ("sd1", 50), ("sdxl", 10)])
def test_the_round_trip_gives_the_pictures_own_latents_and_ddims_does_not(models, family, steps):
    """Under one prompt, without guidance, with nothing kept; relative to the states' scale.

    Networks of random weights are wild: DDIM's way back is as far off as another picture.
    """
    pipe, inputs = models(family), Inputs(image=picture(), mask_image=EVERYWHERE)
    asked = ldm.Request(prompt="sea", target_prompt="sea", num_inference_steps=steps, guidance_scale=1)
    x0, ddims = ddim_round_trip(pipe, asked, inputs)
    drawn = pipe.generate(asked, output_type="latent", inputs=inputs).images
    scale = float(pipe.prepare(asked, inputs).grid.sigmas[0])
    assert 0 < float((drawn - x0).abs().max()) < 1e-4 * scale
    assert float((ddims - x0).abs().max()) > 0.05 * scale


@pytest.mark.parametrize(("steps", "strength"), [(10, 1.0), (50, 0.3)])
def test_the_round_trip_of_the_embedded_model(steps, strength):
    """Relative to the latents' scale; the highest level of zero terminal SNR is left out."""
    pipe = ldm.load(device="cpu", dtype="fp32")
    inputs = Inputs(image=picture(32, 32), mask_image=EVERYWHERE)
    asked = ldm.Request(prompt="a red house", target_prompt="a red house", guidance_scale=1)
    asked = asked.replace(num_inference_steps=steps, strength=strength)
    x0, ddims = ddim_round_trip(pipe, asked, inputs)
    drawn = pipe.generate(asked, output_type="latent", inputs=inputs).images
    assert error(drawn, x0) < 1e-5
    assert error(ddims, x0) > 1e-2


def test_a_mask_keeps_what_it_does_not_cover(models):
    """Its pixels are the photo's, and its latents the picture's own to the last bit."""
    pipe = models("sd1")
    (drawn,) = edit(pipe, mask_image=mask()).images
    kept = np.asarray(mask()) == 0
    same = (np.asarray(drawn) == np.asarray(picture())).all(axis=2)
    assert same[kept].all()
    assert same[~kept].mean() < 0.1
    latents = edit(pipe, mask_image=mask(), output_type="latent").images
    x0 = pipe.prepare(ldm.Request(), Inputs(image=picture())).start.latents.mean
    covered = F.adaptive_max_pool2d(torch.from_numpy(np.asarray(mask()) / 255)[None, None], x0.shape[-2:]) > 0
    assert torch.equal((latents != x0).any(1, keepdim=True), covered)


def test_where_the_texts_do_not_differ_the_photo_comes_back(models):
    (drawn,) = edit(models("sd1"), target_prompt="sea").images
    assert np.array_equal(drawn, picture())


def test_the_mask_is_found_from_the_texts(models, monkeypatch):
    """By half of the picture: the other keeps its pixels, but for a soft edge of one latent and a half."""
    pipe = models("sd1")

    def left(source, target, path, sigmas):
        found = torch.zeros(len(path[0]), 1, *path[0].shape[-2:], dtype=torch.bool)
        found[..., : found.shape[-1] // 2] = (
            source(path[0], sigmas[0]).x0 != target(path[0], sigmas[0]).x0
        ).any()
        return found

    monkeypatch.setattr("ldm.pipeline.edit.edit_mask", left)
    (drawn,) = edit(pipe).images
    same = (np.asarray(drawn) == np.asarray(picture())).all(axis=2)
    edge = pipe.vae.downscale * 3 // 2
    assert same[:, 8 + edge :].all()
    assert same[:, :8].mean() < 0.1


def test_guidance_strength_and_texts_matter_and_seeds_do_not(models):
    pipe, common = models("sd1"), {"output_type": "latent", "mask_image": EVERYWHERE}
    plain = edit(pipe, **common).images
    assert torch.equal(edit(pipe, **common, seed=2).images, plain)
    for other in (
        {"guidance_scale": 3.0},
        {"strength": 0.5},
        {"negative_prompt": "boat"},
        {"prompt": "boat"},
        {"target_prompt": LONG},
        {"target_prompt": "boat"},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert error(edit(pipe, **{**common, **other}).images, plain) > 1e-3, other


def test_edits_of_a_batch_are_those_alone(models):
    pipe, common = models("sd1"), {"output_type": "latent", "mask_image": EVERYWHERE}
    prompts, targets, images = ["sea", "boat"], ["the red boat", "sea"], [picture(), picture(seed=2)]
    together = edit(pipe, prompt=prompts, target_prompt=targets, image=images, **common).images
    alone = [
        edit(pipe, prompt=p, target_prompt=t, image=i, **common).images
        for p, t, i in zip(prompts, targets, images, strict=True)
    ]
    assert error(together, torch.cat(alone)) < 1e-4


def test_an_edits_own_defaults(models):
    asked = ldm.Request(prompt="sea", target_prompt="boat")
    lcm, sd1 = (models(name).resolve(asked, Inputs(image=picture())) for name in ("lcm", "sd1"))
    assert (lcm.num_inference_steps, sd1.num_inference_steps) == (20, 50)
    assert (sd1.sampler, sd1.strength, sd1.eta) == ("ddim", 0.8, 0.0)


def test_each_step_is_seen_and_may_be_changed(models):
    """Of 6 steps at strength 0.9 five levels are left, and the first is where the picture is taken to."""
    pipe, seen = models("sd1"), []

    def watch(pipe, i, t, given):
        seen.append((i, t))
        return {"latents": given["latents"] * 0} if i == 4 else {}

    common = {"mask_image": EVERYWHERE, "strength": 0.9}
    drawn = edit(pipe, **common, output_type="latent", callback_on_step_end=watch).images
    assert [i for i, _ in seen] == [1, 2, 3, 4]
    assert float(drawn.abs().max()) == 0
    asked = ldm.Request(prompt="sea", target_prompt="boat", num_inference_steps=6, strength=0.9)
    steps = list(pipe.denoise(asked, Inputs(image=picture())))
    assert [step.i for step in steps] == [1, 2, 3, 4]
    assert steps[-1].sigma == 0


# --- through the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(folder_of, tmp_path, monkeypatch):
    """The flags of the model, and photo.png in the working folder."""
    monkeypatch.chdir(tmp_path)
    picture().save("photo.png")
    mask().save("mask.png")
    return ["--model", str(folder_of("sd1")), "--device", "cpu", "--dtype", "fp32", "--quiet"]


ASKED = ["-p", "sea", "--to", "the red boat", "--steps", "6", "--invert", "photo.png", "-o", "out.png"]


@pytest.mark.parametrize("flags", [[], ["--mask", "mask.png", "--strength", "0.6"]])
def test_the_command_edits_as_python_does_and_redraws(models, command, capsys, flags):
    assert cli.txt2img([*ASKED, *flags, *command]) == 0
    more = {"mask_image": "mask.png", "strength": 0.6} if flags else {}
    (drawn,) = edit(models("sd1"), image="photo.png", **more).images
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(drawn))
    assert cli.main(["info", "out.png"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {"prompt: sea", "target_prompt: the red boat", "image: photo.png"} <= {*told}
    assert "Target prompt: the red boat" in Image.open("out.png").text["parameters"]
    assert cli.main(["redraw", "out.png", *command]) == 0
    assert "equal: every pixel" in capsys.readouterr().out
    shutil.move("photo.png", "moved.png")
    assert cli.main(["redraw", "out.png", *command]) == 2
    assert "cannot read the picture photo.png" in capsys.readouterr().err
    assert cli.main(["redraw", "out.png", "-i", "moved.png", *command]) == 0
    assert read_request("out.png").sampler == "ddim"


REFUSED = [
    (["--to", "boat", "-i", "photo.png"], "--to TEXT with a picture needs --invert FILE"),
    (["--invert", "photo.png"], "--invert FILE needs --to TEXT"),
    (["--to", "a", "--invert", "photo.png", "-i", "photo.png"], "both name a picture"),
    (["--to", "a", "--invert", "none.png"], "cannot read the picture none.png"),
    (["--to", "a", "--invert", "photo.png", "-b", "2"], "2 seeds: an edit draws no noise"),
    (["--to", "a", "--invert", "photo.png", "--sampler", "unipc"], "the sampler unipc: an edit inverts"),
    (["--to", "a", "--invert", "photo.png", "--steps", "2"], "at least 2 steps within its strength"),
    (["--to", "a <lora:b:1>", "--invert", "photo.png"], "target_prompt has a <lora:...> tag"),
    (["--to", "a", "--invert", "photo.png", "--eta", "0.5"], "eta: an edit inverts"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_the_command_cannot_edit_is_told_in_one_line(command, capsys, flags, message):
    assert cli.txt2img(["-p", "sea", "--steps", "6", "--outdir", "out", *flags, *command]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told
    assert not list(Path("out").rglob("*.png"))


@pytest.mark.parametrize("family", ["inpaint", "pix2pix", "upscaler"])
def test_models_that_take_a_picture_beside_their_latents_do_not_edit(models, family):
    inputs = {"mask_image": mask()} if family == "inpaint" else {}
    with pytest.raises(ldm.UserError, match="target_prompt is not allowed here: only text-to-image models"):
        edit(models(family), **inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": torch.full((3, 16, 16), torch.nan)}, "an image's values must lie in 0..1"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 24)}, "prompt_embeds: an edit inverts"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents: an edit inverts"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "latents as the image: an edit inverts"),
        ({"sampler": ancestral}, "sampler: an edit inverts"),
        ({"num_images_per_prompt": 3}, "3 seeds: an edit draws no noise"),
        ({"target_prompt": ["a", "b"]}, "target_prompt"),
    ],
)
def test_what_python_cannot_edit_is_told_in_one_line(models, arguments, message):
    with pytest.raises(ldm.UserError, match=message) as caught:
        edit(models("sd1"), **arguments)
    assert "\n" not in str(caught.value)
