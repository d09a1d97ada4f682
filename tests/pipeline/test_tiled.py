"""Large pictures drawn in windows that the U-Net sees one by one."""

import threading

import pytest
import torch
from family_inputs import picture

import ldm
from ldm import cli
from ldm.models.conditioning import Conditioning
from ldm.pipeline import networks

FEW = {"num_inference_steps": 3, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(models):
    return models("sd1")


def test_one_tile_is_bit_for_bit_the_whole(pipe):
    asked = {"seed": 4, "height": 32, "width": 16, **FEW}
    assert torch.equal(pipe("sea", **asked).images, pipe("sea", tile_size=32, **asked).images)
    tiled = pipe("sea", tile_size=16, **asked)
    assert not torch.equal(pipe("sea", **asked).images, tiled.images)
    assert tiled.request.tile_overlap == 8


def test_the_first_pass_in_one_tile_the_second_in_nine(pipe):
    asked = {"seed": 4, "hires_scale": 2, **FEW}
    first = pipe("sea", seed=4, num_inference_steps=3, output_type="latent").images
    large = torch.nn.functional.interpolate(first, scale_factor=2, mode="bilinear")
    alone = pipe("sea", seed=4, image=large, strength=0.7, tile_size=16, **FEW)
    job = pipe.prepare(ldm.Request(num_inference_steps=3, hires_scale=2, tile_size=16))
    assert job.tiles is None
    assert len(job.then.job.tiles.windows(16, 16)) == 9
    assert torch.equal(pipe("sea", tile_size=16, **asked).images, alone.images)


def test_a_batch_and_threads_are_as_alone(pipe):
    asked = {"height": 24, "width": 32, "tile_size": 16, "tile_overlap": 8, **FEW}
    batch = pipe("sea", seed=1, num_images_per_prompt=2, **asked).images
    drawn = {}
    threads = [
        threading.Thread(target=lambda k=k: drawn.update({k: pipe("sea", seed=k, **asked).images[0]}))
        for k in (1, 2)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for k, one in enumerate(batch, start=1):
        assert float((one - drawn[k]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["sdxl", "upscaler"])
def test_a_window_is_told_what_lies_in_it(models, name):
    """The mean over windows of what the U-Net says of each, with the size and corner of a crop, by hand."""
    pipe = models(name)
    image = {"image": picture(16, 16), "noise_level": 5} if name == "upscaler" else {}
    request = ldm.Request(prompt="sea", num_inference_steps=2, tile_size=32 if image else 16, tile_overlap=8)
    size = {} if image else {"height": 16, "width": 32}
    inputs = ldm.pipeline.Inputs(image=image.pop("image", None))
    job = pipe.prepare(request.replace(**size, **image), inputs)
    h, w, factor = *job.start.shape[1:], pipe.vae.downscale
    x = torch.randn(1, pipe.vae.latent_channels, h, w)
    cond = job.encode(0)[0]
    if job.model.kind is not ldm.models.kind.Kind.TEXT:
        cond = Conditioning(cond.tokens, class_labels=cond.class_labels, concat=torch.randn(1, 3, h, w))
    sigma = job.grid.sigmas[0]
    got = networks.predict(pipe.unet, job.grid, {"cond": cond}, tiles=job.tiles)(x, sigma, ("cond",))["cond"]
    total, weights = torch.zeros_like(x), torch.zeros(h, w)
    windows = job.tiles.windows(h, w)
    assert len(windows) > 1
    for window in windows:
        fields = {"concat": None if cond.concat is None else window(cond.concat)}
        if cond.time_ids is not None:
            top, left, size = window.top * factor, window.left * factor, 16
            fields["time_ids"] = torch.tensor([[16.0, 32.0, top, left, size, size]])
        own = {"cond": Conditioning(**{**vars(cond), **fields})}
        out = networks.predict(pipe.unet, job.grid, own)(window(x), sigma, ("cond",))["cond"]
        rows, columns = (
            torch.minimum(torch.arange(n) + 1, n - torch.arange(n)) for n in (window.height, window.width)
        )
        weight = rows[:, None] * columns
        window(total).add_(weight * out)
        window(weights).add_(weight)
    assert torch.allclose(got, total / weights, atol=1e-5)


def test_a_picture_in_tiles_redraws(folder_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["-m", str(folder_of("sd1")), "--device", "cpu", "--dtype", "fp32", "--quiet"]
    asked = ["-p", "sea", "--steps", "2", "-W", "32", "-H", "16", "--tile-size", "16", "--tile-overlap", "0"]
    assert cli.txt2img([*model, *asked, "-o", "a.png"]) == 0
    assert cli.main(["redraw", "a.png", *model]) == 0
    assert "equal: every pixel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ({"tile_size": 24}, "tile_size 24 is not allowed: it is larger than the picture"),
        ({"tile_size": 12}, r"tile_size 12 .* \(the nearest are 8 and 16\)"),
        (
            {"tile_size": 8, "tile_overlap": 8},
            "tile_overlap 8 is not allowed: it must be less than tile_size 8",
        ),
        ({"tile_overlap": 8}, "tile_overlap is not allowed here: it goes with a tile_size"),
        ({"tile_size": 8, "tiling": "x"}, "tiling is not allowed beside tile_size"),
    ],
)
def test_tiles_that_make_no_sense_are_refused(pipe, asked, fault):
    with pytest.raises(ldm.UserError, match=fault):
        pipe("sea", **FEW, **asked)
