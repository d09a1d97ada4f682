"""A second pass at a larger size, against the same passes made by hand and by diffusers."""

import importlib.util
import pickle
import sys
import threading
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_folder
from torch.nn import functional as F

import ldm
from ldm import cli
from ldm.images.enlarging import LABELS, LATENT, continued, enlarge_latents, enlarger_name
from ldm.images.parameters import parse_parameters
from ldm.images.png import read_request

MODEL = ("-m", "base", "--device", "cpu", "--dtype", "fp32", "--quiet")
FEW = {"num_inference_steps": 3, "output_type": "pt"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def peer(root):
    return make_folder(root / "base")


@pytest.fixture(scope="module")
def pipe(root, peer):
    return ldm.load(root / "base", device="cpu", dtype="fp32")


@pytest.fixture
def in_place(root, peer, monkeypatch):
    monkeypatch.chdir(root)


def unit_latents(pipe, side=8, seed=0):
    return torch.randn(1, pipe.vae.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_a_latent_pass_is_diffusers_image_to_image_of_interpolated_latents(pipe, peer):
    ours = pipe("the boat", seed=5, hires_upscaler="latent_bicubic", hires={"strength": 0.7}, **FEW).images
    first = peer("the boat", latents=unit_latents(pipe, seed=5), num_inference_steps=3, output_type="latent")
    large = F.interpolate(first.images, scale_factor=2, mode="bicubic")
    parts = {name: peer.components[name] for name in peer.components}
    second = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    theirs = second(
        "the boat",
        image=large,
        strength=0.7,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("name", [*LATENT, "lanczos", "nearest"])
def test_each_upscaler_is_the_two_passes_made_by_hand(pipe, name):
    whole = pipe("sea", seed=2, hires_upscaler=name, hires={"strength": 0.9, "sampler": "euler_a"}, **FEW)
    if name in LATENT:
        first = pipe("sea", seed=2, num_inference_steps=3, output_type="latent").images
        mode, antialias = LATENT[name]
        image = F.interpolate(first, scale_factor=2, mode=mode, antialias=antialias)
    else:
        (first,) = pipe("sea", seed=2, num_inference_steps=3).images
        image = first.resize((32, 32), getattr(Image.Resampling, name.upper()))
        if name == "nearest":  # which the pass does before rounding to 8 bits
            exact = pipe("sea", seed=2, **FEW).images
            image = F.interpolate(exact, scale_factor=2)
    asked = {"height": 32, "width": 32, "strength": 0.9, "sampler": "euler_a"}
    assert torch.equal(whole.images, pipe("sea", seed=2, image=image, **asked, **FEW).images)


def test_the_second_pass_has_its_own_prompt_steps_and_size(pipe):
    hires = ldm.Request(height=24, width=40, prompt="a boat", num_inference_steps=4, strength=0.5)
    made = pipe("sea", seed=1, hires=hires, **FEW)
    first = pipe("sea", seed=1, num_inference_steps=3, output_type="latent").images
    large = F.interpolate(first, (12, 20), mode="bilinear")
    alone = pipe("a boat", seed=1, image=large, strength=0.5, num_inference_steps=4, output_type="pt")
    assert torch.equal(made.images, alone.images)
    assert (made.request.size, made.request.hires.size) == ((16, 16), (24, 40))


def test_a_batch_and_threads_give_what_each_picture_alone_gives(pipe):
    asked = {"num_inference_steps": 3, "hires_scale": 1.5, "output_type": "pt", "sampler": "euler_a"}
    batch = pipe(["sea", "a boat"], seed=3, **asked).images
    alone = [pipe(text, seed=3 + k, **asked).images[0] for k, text in enumerate(["sea", "a boat"])]
    assert batch.shape[-1] == 24
    for one, own in zip(batch, alone, strict=True):
        assert float((one - own).abs().max()) < 1e-5
    drawn = {}
    threads = [
        threading.Thread(target=lambda k=k: drawn.update({k: pipe("sea", seed=k, **asked).images}))
        for k in (3, 4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(drawn[3][0], alone[0])
    assert torch.equal(drawn[4], pipe("sea", seed=4, **asked).images)


def test_a_progress_bar_sees_all_steps_and_a_callback_the_first_pass(pipe):
    job = pipe.prepare(ldm.Request(num_inference_steps=4, hires_scale=2, seeds=(1, 2)))
    seen, told = [], []
    pipe.draw(job, lambda step: seen.append(step.i))
    assert seen == [*range(4), 4, 5, 6, 7][: len(seen)]
    assert len(seen) == job.count_steps(job.batches[0]) == 4 + 2 * 2
    pipe("", **FEW, hires_scale=2, callback_on_step_end=lambda p, i, t, k: told.append(i))
    assert told == [0, 1, 2]


def test_the_png_tells_it_and_redraws(in_place, capsys):
    flags = ["--hires-scale", "1.5", "--hires-upscaler", "Latent (nearest-exact)", "--hires-strength", "0.75"]
    flags += ["--hires-steps", "4", "--hires-prompt", "a boat, sharp", "--hires-sampler", "DPM++ 2M Karras"]
    assert cli.txt2img([*MODEL, "-p", "a boat", "--steps", "2", "-s", "5", "-o", "a.png", *flags]) == 0
    assert Image.open("a.png").size == (24, 24)
    request = read_request("a.png")
    assert request.hires_upscaler == "latent_nearest_exact"
    assert (request.hires.sampler, request.hires.spacing) == ("dpmpp_2m", "karras")
    assert request.hires.prompt == "a boat, sharp"
    text = Image.open("a.png").text["parameters"]
    for part in ("Hires upscale: 1.5", "Hires steps: 3", "Hires upscaler: Latent (nearest-exact)"):
        assert part in text
    read = parse_parameters(text)
    assert (read.hires_scale, read.hires_upscaler) == (1.5, "latent_nearest_exact")
    assert (read.hires.strength, read.hires.num_inference_steps, read.hires.num_steps) == (0.75, 4, 3)
    assert (read.hires.sampler, read.hires.prompt) == ("dpmpp_2m", "a boat, sharp")
    assert cli.main(["redraw", "a.png", *MODEL]) == 0
    assert "equal: every pixel" in capsys.readouterr().out


def test_a_text_of_a1111_without_steps_of_its_own_makes_as_many_as_the_first_pass():
    read = parse_parameters(
        "a boat\nSteps: 20, Sampler: Euler a, Size: 512x512, Denoising strength: 0.7, Hires resize: 1024x768"
        ", Hires upscaler: 4x-UltraSharp"
    )
    assert read.hires.num_steps == 20
    assert (read.hires.size, read.hires_upscaler) == ((768, 1024), "4x-UltraSharp")
    assert "Hires" not in str(parse_parameters("a boat\nSteps: 20, Hires upscaler: Latent"))


def test_names_are_a1111s_too():
    assert all(enlarger_name(label) == name for name, label in LABELS.items())
    assert enlarger_name("model.safetensors") is None


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("size", [(16, 12), (12, 9)])
def test_what_continues_is_enlarged_as_its_own_neighbour(name, size):
    x = torch.randn(1, 4, 8, 6)
    enlarge = continued(lambda x, size: enlarge_latents(name, x, size), "xy")
    middle = enlarge_latents(name, x.repeat(1, 1, 5, 5), (5 * size[0], 5 * size[1]))
    expected = middle[..., 2 * size[0] : 3 * size[0], 2 * size[1] : 3 * size[1]]
    assert torch.allclose(enlarge(x, size), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ({"hires_scale": 8, "height": 1024, "width": 512}, "makes 4096x8192, too many: give at most 4"),
        ({"hires_scale": 9}, "hires_scale 9 is not allowed: it must be a number from 1 to 8"),
        ({"hires": {"height": 100, "width": 96}}, r"height 100 .* \(the nearest are 96 and 104\)"),
        ({"hires": {"height": 96}}, "hires has a height or a width alone"),
        ({"hires": {"height": 96, "width": 96}, "hires_scale": 2}, "makes 32x32 pixels, and hires asks"),
        ({"hires_upscaler": "latent_cubic"}, "latent_cubic is not known: give latent, "),
        ({"hires_upscaler": "no.safetensors"}, "no such file"),
        ({"hires": {"strength": 0.1}}, "strength 0.1 of 3 steps leaves none"),
        ({"hires_scale": 2, "image": "i", "mask_image": "m"}, "hires is not allowed beside mask_image"),
    ],
)
def test_what_cannot_be_is_told_before_drawing(pipe, asked, fault, tmp_path):
    for name in ("image", "mask_image"):
        if name in asked:
            asked = {**asked, name: Image.new("RGB" if name == "image" else "L", (16, 16), 255)}
    with pytest.raises(ldm.UserError, match=fault):
        pipe("sea", **FEW, **asked)


# --- networks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A tiny random ESRGAN of factor 2, saved, and itself."""
    if importlib.util.find_spec("spandrel") is None:
        pytest.skip("spandrel is not installed")
    from ldm.checkpoint.beside.esrgan import import_spandrel

    import_spandrel()
    from safetensors.torch import save_file
    from spandrel.architectures.ESRGAN import ESRGAN

    made = ESRGAN(num_filters=8, num_blocks=1, scale=2).eval()
    path = tmp_path_factory.mktemp("upscalers") / "tiny.safetensors"
    save_file(made.state_dict(), path)
    return path, made


def test_a_network_enlarges_pixels(pipe, network):
    path, made = network
    first = pipe("sea", seed=2, **FEW).images
    with torch.no_grad():
        image = made(first).clamp(0, 1)
    whole = pipe("sea", seed=2, hires_upscaler=str(path), hires={"strength": 0.9}, **FEW)
    assert torch.equal(whole.images, pipe("sea", seed=2, image=image, strength=0.9, **FEW).images)
    assert pipe("sea", hires_scale=3, hires_upscaler=str(path), **FEW).images.shape[-1] == 48
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__file__


def test_a_picture_of_a_network_redraws_and_another_file_is_refused(in_place, network, capsys):
    path, _ = network
    asked = ["-p", "sea", "--steps", "2", "-o", "n.png", "--hires-upscaler", str(path)]
    assert cli.txt2img([*MODEL, *asked]) == 0
    assert cli.main(["redraw", "n.png", *MODEL]) == 0
    moved = path.rename(path.with_name("moved.safetensors"))
    try:
        assert cli.main(["redraw", "n.png", *MODEL]) == 2
        assert cli.main(["redraw", "n.png", *MODEL, "--hires-upscaler", str(moved)]) == 0
        data = bytearray(moved.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        capsys.readouterr()
        assert cli.main(["redraw", "n.png", *MODEL]) == 2
        assert "is not the upscaler that this picture was drawn with" in capsys.readouterr().err
    finally:
        moved.rename(path)


def test_a_pickle_with_code_is_refused_unread(pipe, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for name, fault in (
        ("a.pth", "from .safetensors only: a .pth may be a pickle"),
        ("b.safetensors", "b.saf"),
    ):
        (tmp_path / name).write_bytes(pickle.dumps(Code()))
        with pytest.raises(ldm.UserError, match=fault):
            pipe("sea", **FEW, hires_upscaler=str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_a_network_that_enlarges_nothing_is_refused(pipe, tmp_path, network):
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ldm.UserError, match="spandrel knows no upscaler of these tensors"):
        pipe("sea", **FEW, hires_upscaler=str(tmp_path / "other.safetensors"))


def test_a_picture_that_names_a_network_elsewhere_opens_nothing(in_place, capsys):
    from ldm.images.png import save_png

    request = ldm.Request(hires_upscaler="//evil/share/a.safetensors")
    save_png(Image.fromarray(np.zeros((16, 16, 3), np.uint8)), Path("evil.png"), request)
    assert cli.main(["redraw", "evil.png", *MODEL]) == 2
    assert "on another computer" in capsys.readouterr().err
