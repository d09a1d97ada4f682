"""`info` and `redraw` of pictures of other programs, of Python, of old versions, and of strangers."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ldm
from ldm import cli
from ldm.images.fitting import read_file
from ldm.images.png import read_request, save_png
from ldm.pipeline import Inputs
from ldm.request import Request

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\x9b1m\u202egnp.exe\nmodel: mine"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unloaded(monkeypatch):
    """What is wrong is found before any model is loaded."""
    monkeypatch.setattr("ldm.cli.drawing.redraw.load", lambda args: pytest.fail("the model was loaded"))


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


@pytest.fixture
def again(tiny_folder):
    return ["redraw", "a.png", "-m", str(tiny_folder), "--device", "cpu", "--dtype", "fp32", "--quiet"]


def write(text, chunk="parameters", path="a.png"):
    chunks = PngInfo()
    chunks.add_text(chunk, text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=chunks)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("Sampler", "SEEDS 3"),
        ("Schedule type", "Bong tangent"),
        ("Size", "500x333"),
        ("Seed", "-1"),
        ("Clip skip", "two"),
        ("CFG scale", "high"),
    ],
)
def test_info_shows_what_only_redraw_refuses(unloaded, capsys, setting, value):
    write(f'a red boat\nSteps: 12, {setting}: {value},\nLora hashes: "a: 1, b: 2"')
    assert cli.main(["info", "a.png"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "prompt: a red boat",
        "Steps: 12",
        f"{setting}: {value}",
        "Lora hashes: a: 1, b: 2",
    ]
    assert "note: a.png does not say what can be drawn" in told.err
    assert cli.main(["redraw", "a.png"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert value.split("x")[0] in told.err


@pytest.mark.parametrize(
    ("text", "chunk"),
    [
        (f"a\nSteps: 3, Model: x{ESCAPES}, {ESCAPES}: 4", "parameters"),
        (f"a{ESCAPES}\nSteps: 3, Size: 8x{ESCAPES}", "parameters"),
        (Request(prompt=ESCAPES, model=ESCAPES, model_hash=ESCAPES, image=ESCAPES).to_json(), "ldm"),
        (f'{{"version": 1, "prompt": "a", "{ESCAPES.encode("unicode_escape").decode()}": 3}}', "ldm"),
        (f"{ESCAPES}", "ldm"),
        (f"{ESCAPES}", ESCAPES.replace("\x00", "")[:20]),
    ],
)
@pytest.mark.parametrize("command", ["info", "redraw"])
def test_escapes_never_reach_the_terminal(monkeypatch, capsys, text, chunk, command):
    monkeypatch.setattr("ldm.cli.drawing.redraw.load", lambda args: OtherModel())
    monkeypatch.setattr("ldm.checkpoint.source.embedded", lambda: None)
    try:
        write(text, chunk)
    except UnicodeEncodeError:  # the name of a chunk is Latin-1
        write(text, "\x1b[2J\x9b")
    cli.main([command, "a.png"])
    told = capsys.readouterr()
    assert told.out + told.err
    assert all(c.isprintable() or c == "\n" for c in told.out + told.err)
    if chunk == "ldm":  # each field is one line, and a message quotes names in one
        assert not any(line.startswith("model: mine") for line in (told.out + told.err).splitlines())


class OtherModel:
    """A model that reads the file that a picture's request asks for."""

    name, model_hash, upscaler = "other", "0123456789", None

    def prepare(self, request):
        read_file(request.image)


@pytest.mark.parametrize("field", ["image", "mask_image"])
@pytest.mark.parametrize(
    "path", [r"\\host\share\a.png", "//host/share/a.png", r"\/host\a.png", r"\\?\UNC\host\share\a.png"]
)
def test_a_picture_cannot_make_us_ask_another_computer(unloaded, capsys, field, path):
    save_png(Image.new("RGB", (64, 64)), Path("a.png"), Request(**{field: path}))
    assert cli.main(["redraw", "a.png"]) == 2
    told = capsys.readouterr().err
    assert "on another computer" in told
    assert {"image": "--init-image", "mask_image": "--mask"}[field] in told


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes are POSIX's")
@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
def test_a_picture_cannot_make_us_read_a_device(again, capsys, path):
    os.mkfifo("pipe")
    save_png(Image.new("RGB", (64, 64)), Path("a.png"), Request(image=path, strength=0.5))
    assert cli.main(again) == 2
    assert f"cannot read the picture {path}: it is not an ordinary file" in capsys.readouterr().err


# --- what Python kept ------------------------------------------------------------------------------------


def test_a_request_of_several_seeds_is_compared_with_each(pipe, again, capsys):
    result = pipe("sea", num_inference_steps=2, seed=[5, 9, 7], num_images_per_prompt=3)
    save_png(result.images[1], Path("a.png"), result.request)
    assert cli.main([*again, "-o", "b.png"]) == 0
    assert capsys.readouterr().out == "equal: every pixel (seed 9, the nearest of 3)\n"
    assert read_request("b.png").seeds == (9,)
    save_png(result.images[1], Path("a.png"), result.request.replace(seeds=(5, 7)))
    assert cli.main(again) == 1
    assert "of 255 levels (seed " in capsys.readouterr().out


def used(seed=3):
    generator = torch.Generator().manual_seed(seed)
    torch.rand(1, generator=generator)
    return generator


def own_solver(denoise, x, sigmas, noise):
    from ldm.diffusion.methods.ancestral import ancestral

    return ancestral(denoise, x, sigmas, noise)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents"),
        ({"prompt_embeds": torch.zeros(1, 16, 24)}, "prompt_embeds"),
        ({"sampler": own_solver}, "sampler"),
        ({"generator": used()}, "generator"),
        ({"image": Image.new("RGB", (16, 16))}, "image"),
    ],
)
def test_redraw_says_what_a_picture_of_python_lacks(pipe, unloaded, capsys, arguments, named):
    prompt = None if "prompt_embeds" in arguments else "sea"
    result = pipe(prompt, num_inference_steps=2, **arguments)
    assert result.request.not_kept == (named,)
    save_png(result.images[0], Path("a.png"), result.request)
    assert cli.main(["info", "a.png"]) == 0
    assert f"not_kept: ('{named}',)" in capsys.readouterr().out.splitlines()
    assert cli.main(["redraw", "a.png"]) == 2
    assert f"drawn in Python with {named} from memory, which is not kept" in capsys.readouterr().err


def test_an_image_of_memory_may_be_given_as_a_file(pipe, again, capsys):
    Image.new("RGB", (16, 16), "red").save("red.png")
    result = pipe("sea", num_inference_steps=2, seed=3, image=Image.open("red.png"))
    save_png(result.images[0], Path("a.png"), result.request)
    assert cli.main([*again, "-i", "red.png", "-o", "b.png"]) == 0
    assert read_request("b.png").not_kept == ()
    again = pipe.generate(result.request.replace(image="red.png"))
    assert again.request.not_kept == ()
    assert again.images[0].tobytes() == result.images[0].tobytes()


def test_an_eta_that_an_old_version_kept_is_passed_over_again(pipe, again, capsys):
    result = pipe("sea", num_inference_steps=2, seed=3, sampler="euler")
    save_png(result.images[0], Path("a.png"), result.request.replace(eta=0.5))
    assert cli.main(again) == 0
    with pytest.raises(
        ldm.UserError, match=r"eta 0.5 is not allowed here: euler has none, only ddim, euler_a"
    ):
        pipe.generate(result.request.replace(eta=0.5))


def test_a_jpeg_is_drawn_again_from_its_comment(pipe, again, capsys):
    result = pipe(
        "sea", num_inference_steps=2, seed=3, sampler="euler", width=16, height=16, guidance_scale=7
    )
    exif = Image.Exif()
    text = "sea\nSteps: 2, Sampler: Euler,\nCFG scale: 7, Seed: 3, Size: 16x16"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    result.images[0].save("a.jpg", quality=100, subsampling=0, exif=exif)
    assert cli.main([again[0], "a.jpg", *again[2:], "-o", "b.png"]) == 1
    assert "only PNGs surely keep every pixel, and a.jpg is none" in capsys.readouterr().err
    assert Image.open("b.png").tobytes() == result.images[0].tobytes()


def test_marks_in_prompts_are_told_once(again, tiny_folder, capsys):
    Path("p").write_text("two boats\n(sea:1.2)\n((boat))\n", encoding="utf-8")
    again = [flag for flag in again if flag != "--quiet"]
    drawn = ["txt2img", "--from-file", "p", "--steps", "1", *again[2:], "--outdir", "o", "--skip-save"]
    assert cli.main(drawn) == 0
    told = capsys.readouterr().out
    assert told.count("AUTOMATIC1111") == 1
    assert "'sea' has weight 1.2: as in AUTOMATIC1111; --prompt-grammar plain takes marks for text" in told
    for silent in (["--prompt-grammar", "a1111"], ["--prompt-grammar", "plain"], ["-q"]):
        assert cli.main([*drawn, *silent]) == 0
        assert "AUTOMATIC1111" not in capsys.readouterr().out
    write("((sea))\nSteps: 1, Size: 64x64")
    cli.main(again)
    assert "'sea' has weight 1.21" in capsys.readouterr().out


def test_fresh_generators_are_kept_as_their_seeds(pipe):
    def fresh():
        return torch.Generator().manual_seed(4)

    assert pipe("sea", num_inference_steps=1, generator=fresh()).request.not_kept == ()
    one = fresh()
    result = pipe("sea", num_inference_steps=1, generator=one, num_images_per_prompt=2)
    assert result.request.not_kept == ("generator",)
    kept = Request(prompt="sea", num_inference_steps=1, seeds=(5,))
    assert pipe.generate(kept, inputs=Inputs(generators=[fresh()])).request.not_kept == ("generator",)


def test_what_was_not_so_is_not_kept(pipe):
    from ldm.diffusion.guidance import CFG

    result = pipe("sea", num_inference_steps=1, sampler=own_solver, guidance=CFG(2.0), guidance_rescale=0.5)
    request = result.request
    assert request.not_kept == ("sampler", "guidance")
    assert (request.sampler, request.eta, request.guidance_scale, request.guidance_rescale) == (
        None,
        None,
        None,
        0,
    )
    with pytest.raises(ldm.UserError, match="with sampler, guidance from memory"):
        pipe.generate(request)
    same = pipe.generate(request, inputs=Inputs(solver=own_solver, guidance=CFG(2.0)))
    assert same.images[0].tobytes() == result.images[0].tobytes()
    assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize("sampler", ["euler", "DPM++ 2M Karras", "ddpm", own_solver])
def test_an_eta_that_means_nothing_is_refused(pipe, sampler):
    with pytest.raises(ldm.UserError, match=r"eta 0\.5 is not allowed here"):
        pipe("sea", num_inference_steps=1, sampler=sampler, eta=0.5)


def test_compvis_commands_give_an_eta_of_0_to_every_sampler(pipe):
    assert pipe("sea", num_inference_steps=1, sampler="pndm", eta=0.0).images
