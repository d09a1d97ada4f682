"""Pictures that continue at their other edge, against A1111's way with diffusers' modules."""

import copy
import threading

import pytest
import torch
from tiny_adapters import save_diffusers
from tiny_pipeline import make_folder

import ldm
from ldm import cli
from ldm.adapters.seamless import seamless

FEW = {"num_inference_steps": 3, "output_type": "pt"}


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seamless") / "model"
    made = make_folder(folder)
    return made, ldm.load(folder, device="cpu", dtype="fp32"), folder


@pytest.fixture(scope="module")
def pipe(peer):
    return peer[1]


@pytest.fixture(scope="module")
def noise(pipe):
    return torch.randn(1, pipe.vae.latent_channels, 8, 8, generator=torch.Generator().manual_seed(3))


def gap(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize(("axes", "moved"), [("x", (0, 2)), ("y", (4, 0)), ("xy", (2, 6))])
def test_rolled_noise_draws_the_rolled_picture(pipe, noise, axes, moved):
    dims, factor = (-2, -1), pipe.vae.downscale
    whole = pipe("sea", latents=noise, tiling=axes, **FEW).images
    rolled = pipe("sea", latents=noise.roll(moved, dims), tiling=axes, **FEW).images
    assert gap(rolled, whole.roll([factor * by for by in moved], dims)) < 1e-4
    plain = pipe("sea", latents=noise.roll(moved, dims), **FEW).images
    assert gap(plain, whole.roll([factor * by for by in moved], dims)) > 1e-2


def test_one_axis_leaves_the_other_as_it_is(pipe, noise):
    whole, rolled = (pipe("sea", latents=n, tiling="x", **FEW).images for n in (noise, noise.roll(2, -2)))
    assert gap(rolled, whole.roll(4, -2)) > 1e-2


def test_as_a1111_does_it_with_circular_padding_in_every_convolution(peer, noise):
    theirs, pipe, _ = peer
    made = copy.deepcopy(theirs)
    for module in (made.unet, made.vae):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.padding_mode = "circular"
    asked = {"latents": noise, "num_inference_steps": 3, "output_type": "pt"}
    made.set_progress_bar_config(disable=True)
    assert gap(pipe("sea", tiling="xy", **asked).images, made("sea", **asked).images) < 1e-4


def test_an_encoded_picture_rolls_too(pipe):
    """Its encoder pads outside of its strided convolutions, which A1111's way leaves as it was."""
    vae, images = seamless(pipe.vae, "xy"), torch.rand(1, 3, 16, 24)
    moved = vae.encode(images.roll((4, 2), (-2, -1))).mean
    assert gap(moved, vae.encode(images).mean.roll((2, 1), (-2, -1))) < 1e-4


def test_threads_share_a_pipeline_and_its_tensors(pipe):
    asked = [{"tiling": axes, "seed": 1, **FEW} for axes in (None, "xy", "x", None)]
    alone = [pipe("sea", **each).images for each in asked]
    drawn = {}
    threads = [
        threading.Thread(target=lambda k=k: drawn.update({k: pipe("sea", **asked[k]).images}))
        for k in range(len(asked))
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(drawn[k], alone[k]) for k in drawn)
    assert len(drawn) == 4
    other = pipe.seamless("xy")
    assert pipe.seamless("xy") is other
    for a, b in zip(pipe.unet.parameters(), other.unet.parameters(), strict=True):
        assert a is b
    assert pipe.unet.conv_in.padding == (1, 1)


def test_a_lora_is_seamless_too(peer, tmp_path, noise):
    theirs, pipe, _ = peer
    adapted = pipe.with_lora(save_diffusers(theirs, tmp_path / "lora.safetensors"))
    beside, fused = (
        each("sea", latents=noise, tiling="xy", **FEW).images for each in (adapted, adapted.fuse())
    )
    assert gap(beside, fused) < 1e-4
    assert gap(beside, pipe("sea", latents=noise, tiling="xy", **FEW).images) > 1e-3


def test_a_second_pass_stays_seamless(pipe):
    whole = pipe("sea", seed=1, tiling="xy", hires_upscaler="latent_bicubic", **FEW)
    assert whole.request.tiling == "xy"
    job = pipe.prepare(whole.request)
    assert job.then.job.request.tiling == "xy"
    assert job.then.job.model.unet.conv_in.padding == (0, 0)


def test_a_seamless_picture_redraws(peer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["-m", str(peer[2]), "--device", "cpu", "--dtype", "fp32", "--quiet"]
    assert cli.txt2img([*model, "-p", "sea", "--steps", "2", "--tiling", "y", "-o", "a.png"]) == 0
    assert cli.main(["redraw", "a.png", *model]) == 0
    assert "equal: every pixel" in capsys.readouterr().out
