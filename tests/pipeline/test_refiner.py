"""SDXL's two models in one run, against diffusers' two pipelines of the same tiny random weights."""

import threading

import pytest
import torch

import ldm
from ldm import cli
from ldm.images.png import read_request

STEPS = {"num_inference_steps": 5}


@pytest.fixture(scope="module")
def both(models):
    return models("sdxl").with_refiner(models("refiner"))


def unit_latents(seed=7):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def gap(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("at", [0.8, 0.5, 0.33])
def test_hand_over_as_diffusers(families, models, both, at):
    base, refiner = families("sdxl")[1], families("refiner")[1]
    left = base("sea", latents=unit_latents(), denoising_end=at, output_type="latent", **STEPS).images
    ours = models("sdxl")("sea", seed=7, denoising_end=at, output_type="latent", **STEPS).images
    assert gap(ours, left) < 1e-4
    end = refiner("sea", image=left, denoising_start=at, output_type="latent", **STEPS).images
    apart = models("refiner")("sea", image=left, denoising_start=at, output_type="latent", **STEPS).images
    assert gap(apart, end) < 1e-4
    assert gap(both("sea", seed=7, refiner_switch_at=at, output_type="latent", **STEPS).images, end) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_a", "unipc"])
def test_in_each_sampler_a_run_that_is_left_goes_on_at_its_level(models, sampler):
    """ddim has no history and no noise: two halves are the whole."""
    pipe = models("sdxl")
    asked = {"sampler": sampler, "output_type": "latent", "num_inference_steps": 6}
    left = pipe("sea", seed=7, denoising_end=0.5, **asked).images
    end = pipe("sea", seed=7, image=left, denoising_start=0.5, **asked).images
    whole = pipe("sea", seed=7, **asked).images
    assert end.isfinite().all()
    if sampler == "ddim":
        assert gap(end, whole) < 1e-5


def test_a_batch_is_as_each_alone(both):
    asked = {"output_type": "pt", **STEPS}
    batch = both(["sea", "a boat"], seed=1, num_images_per_prompt=2, **asked).images
    for k, text in enumerate(["sea", "sea", "a boat", "a boat"]):
        assert gap(batch[k : k + 1], both(text, seed=1 + k, **asked).images) < 1e-4
    again = both(["sea", "a boat"], seed=1, num_images_per_prompt=2, **asked).images
    assert torch.equal(batch, again)


def test_threads_draw_as_one_after_the_other(both):
    asked, drawn = {"output_type": "pt", **STEPS}, {}
    alone = [both("sea", seed=k, **asked).images for k in range(3)]
    threads = [
        threading.Thread(target=lambda k=k: drawn.update({k: both("sea", seed=k, **asked).images}))
        for k in range(3)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(drawn[k], alone[k]) for k in range(3))


def test_a_second_pass_follows_the_refiner(models, both):
    whole = both("sea", seed=2, hires_scale=2, output_type="pt", **STEPS)
    first = both("sea", seed=2, output_type="latent", **STEPS).images
    large = torch.nn.functional.interpolate(first, scale_factor=2, mode="bilinear")
    alone = models("sdxl")("sea", seed=2, image=large, strength=0.7, output_type="pt", **STEPS)
    assert torch.equal(whole.images, alone.images)


def test_the_png_names_the_refiner_and_redraws(folder_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["-m", str(folder_of("sdxl")), "--device", "cpu", "--dtype", "fp32", "--quiet"]
    refiner = ["--refiner", str(folder_of("refiner"))]
    asked = ["-p", "sea", "--steps", "4", "--refiner-switch-at", "0.6", "-o", "a.png"]
    assert cli.txt2img([*model, *refiner, *asked]) == 0
    refining = read_request("a.png").refining
    assert (refining.model, refining.aesthetic_score) == ("refiner", 6.0)
    assert cli.main(["redraw", "a.png", *model, *refiner]) == 0
    told = capsys.readouterr()
    assert "equal: every pixel" in told.out
    assert "note" not in told.err
    assert cli.main(["redraw", "a.png", *model]) == 1
    assert "a.png was refined by refiner" in capsys.readouterr().err


def test_what_is_no_refiner_is_refused(models, both):
    with pytest.raises(ldm.UserError, match="upscaler is no refiner: it draws from an image"):
        models("sdxl").with_refiner(models("upscaler"))
    with pytest.raises(ldm.UserError, match=r"sd1 is no refiner of this model: .* scaling_factor is 0"):
        models("sdxl").with_refiner(models("sd1"))
    faults = [
        (models("sdxl"), {"refiner_switch_at": 0.8}, "give a refiner"),
        (both, {"refiner_switch_at": 0.0}, "refiner_switch_at 0 leaves no step before it"),
        (both, {"refiner_switch_at": 1.0}, "denoising_start 1 leaves no step"),
        (both, {"denoising_end": 0.5}, "denoising_end is not allowed with a refiner"),
        (models("sdxl"), {"denoising_start": 0.5}, "denoising_start is for latents as the image"),
        (
            models("sdxl"),
            {"denoising_start": 0.5, "strength": 0.5, "image": unit_latents()},
            "strength is not",
        ),
        (
            models("sdxl"),
            {"denoising_start": 0.5, "denoising_end": 0.5, "image": unit_latents()},
            "it must be less than denoising_end 0.5",
        ),
    ]
    for pipe, asked, fault in faults:
        with pytest.raises(ldm.UserError, match=fault):
            pipe("sea", **STEPS, **asked)
