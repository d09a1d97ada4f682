"""The commands, in this process: first with a pipeline that costs nothing, then with a real tiny model."""

import io
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm.cli import command
from ldm.cli import draw as drawing
from ldm.cli import redraw as redrawing
from ldm.cli.parser import Parser, dashes
from ldm.images.pixels import to_tensor
from ldm.images.png import read_request, save_png
from ldm.pipeline.job import Job, Picture
from ldm.request import Request

ROOT = Path(__file__).parents[2]


class FakePipeline:
    """The interface that the command line uses; every seed gives other pixels."""

    name = "fake"
    vae = SimpleNamespace(latent_channels=4, downscale=8)
    runtime = SimpleNamespace(device=torch.device("cpu"))
    adapted = SimpleNamespace(reports=())

    model_hash = "0123456789"
    upscaler = None

    def __init__(self, fail_at=None, error=None):
        self.requests, self.steps, self.fail_at, self.error = [], 0, fail_at, error

    def resolve(self, request):
        defaults = {"height": 16, "width": 24, "num_inference_steps": 3, "guidance_scale": 7.0}
        absent = [name for name in defaults if getattr(request, name) is None]
        named = {"model": "fake", "model_hash": request.model_hash or self.model_hash}
        return request.replace(**named, **{name: defaults[name] for name in absent})

    def prepare(self, request, batch_size=1):
        asked = [request] if isinstance(request, Request) else request
        requests = tuple(self.resolve(each) for each in asked)
        pictures = [Picture(p, each, seed, seed) for p, each in enumerate(requests) for seed in each.seeds]
        batches = tuple(tuple(pictures[i : i + batch_size]) for i in range(0, len(pictures), batch_size))
        unused = dict.fromkeys(("encode", "sampler", "options", "guidance", "start"))
        grid = SimpleNamespace(timesteps=range(requests[0].num_inference_steps))
        return Job(model=self, requests=requests, batches=batches, grid=grid, **unused)

    def draw_batch(self, job, batch, on_step=lambda step: None):
        request = job.requests[batch[0].prompt].replace(seeds=tuple(picture.seed for picture in batch))
        self.requests.append(request)
        for i in range(request.num_inference_steps):
            self.steps += 1
            if self.steps == self.fail_at:
                raise self.error
            on_step(SimpleNamespace(i=i))
        return to_tensor([self.draw(request, seed) for seed in request.seeds])

    def draw(self, request, seed):
        shape = (request.height, request.width, 3)
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))

    def unknown_words(self, prompt):
        return [word for word in prompt.split() if word in ("dragon", "castle")]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    pipe = FakePipeline()
    for module in (drawing, redrawing):
        monkeypatch.setattr(module, "load", lambda args: pipe)
    monkeypatch.setattr("ldm.pipeline.sample.draw_batch", pipe.draw_batch)
    monkeypatch.setattr("ldm.pipeline.job.prepare", FakePipeline.prepare)
    monkeypatch.chdir(tmp_path)
    return pipe


def parsed(*argv):
    parser = Parser("txt2img")
    drawing.add_flags(parser)
    return parser.parse_args(dashes(argv))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# --- flags ---


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--ddim_steps", "7"], "steps", 7),
        (["--ddim-steps=7"], "steps", 7),
        (["--steps", "7"], "steps", 7),
        (["--num_inference_steps", "7"], "steps", 7),
        (["--ddim_eta", "0.5"], "eta", 0.5),
        (["--ddim-eta", "0.5"], "eta", 0.5),
        (["--eta", "0.5"], "eta", 0.5),
        (["--scale", "5"], "scale", 5.0),
        (["--cfg_scale", "5"], "scale", 5.0),
        (["--cfg-scale", "5"], "scale", 5.0),
        (["--n_iter", "2"], "n_iter", 2),
        (["--n-iter", "2"], "n_iter", 2),
        (["-b", "2"], "n_iter", 2),
        (["--batch-count", "2"], "n_iter", 2),
        (["--n_samples", "2"], "n_samples", 2),
        (["--n-samples", "2"], "n_samples", 2),
        (["--n_rows", "2"], "n_rows", 2),
        (["--fixed_code"], "fixed_code", True),
        (["--fixed-code"], "fixed_code", True),
        (["--skip_grid"], "skip_grid", True),
        (["--skip-save"], "skip_save", True),
        (["--plms"], "sampler", "pndm"),
        (["--dpm_solver"], "sampler", "dpmpp_2m"),
        (["--sampler", "ddim"], "sampler", "ddim"),
        (["--scheduler", "karras"], "scheduler", "karras"),
        (["--H", "64"], "height", 64),
        (["-H", "64"], "height", 64),
        (["--height", "64"], "height", 64),
        (["--W", "64"], "width", 64),
        (["-W", "64"], "width", 64),
        (["--C", "4"], "C", 4),
        (["--f", "8"], "f", 8),
        (["--precision", "full"], "dtype", "fp32"),
        (["--precision", "autocast"], "dtype", None),
        (["--ckpt", "m"], "model", "m"),
        (["-m", "m"], "model", "m"),
        (["-s", "-1"], "seed", -1),
        (["--negative_prompt", "a_b --c_d"], "negative_prompt", "a_b --c_d"),
        (["--negative_prompt=--a_b"], "negative_prompt", "--a_b"),
        (["--clip_skip", "1"], "clip_skip", 1),
        (["--outdir", "a_b"], "outdir", Path("a_b")),
    ],
)
def test_flags_in_both_spellings(argv, name, value):
    assert getattr(parsed("--prompt", "a", *argv), name) == value


def test_every_long_flag_has_both_spellings():
    parser = Parser("txt2img")
    drawing.add_flags(parser)
    long_flags = [flag for action in parser._actions for flag in action.option_strings if "-" in flag[2:]]
    assert len(long_flags) > 15
    assert all("_" not in flag for flag in long_flags)
    assert dashes([flag.replace("-", "_").replace("__", "--", 1) for flag in long_flags]) == long_flags


def test_underscores_change_only_in_names_of_flags():
    argv = ["--from_file=a_b", "-o", "x_y.png", "--prompt", "--not_a flag", "--n_iter", "3"]
    assert dashes(argv) == ["--from-file=a_b", "-o", "x_y.png", "--prompt", "--not_a flag", "--n-iter", "3"]


def test_defaults():
    args = parsed("-p", "a")
    assert (args.seed, args.n_iter, args.n_samples) == (42, 1, 1)
    assert args.outdir == Path("outputs/txt2img-samples")


SCRIPT = str(ROOT / "scripts" / "txt2img.py")


@pytest.mark.parametrize("command", [["-m", "ldm"], ["-m", "ldm", "txt2img"], [SCRIPT]])
def test_help_needs_no_installation_and_no_heavy_module(command, tmp_path):
    argv = [sys.executable, "-X", "importtime", *command, "--help"]
    cwd = ROOT if "-m" in command else tmp_path
    out = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "rich", "PIL", "transformers"}
    assert "usage:" in out.stdout


def test_version(capsys):
    for program in (cli.txt2img, cli.main):
        with pytest.raises(SystemExit) as stop:
            program(["--version"])
        assert stop.value.code == 0
        assert capsys.readouterr().out == f"ldm {ldm.__version__}\n"


# --- drawing, with the fake ---


def test_one_picture(fake, capsys):
    assert cli.txt2img(["--prompt", "a boat", "--ddim_steps", "2", "--scale", "5", "--plms"]) == 0
    assert files(".") == ["outputs/txt2img-samples/samples/00000.png"]
    request = read_request("outputs/txt2img-samples/samples/00000.png")
    assert request == fake.resolve(
        Request(prompt="a boat", seeds=(42,), num_inference_steps=2, guidance_scale=5.0, sampler="pndm")
    )
    out, err = capsys.readouterr()
    path, memory = out.splitlines()
    assert path.startswith("outputs/txt2img-samples/samples/00000.png  seed 42  ")
    assert path.endswith(" s")
    assert memory.startswith("peak memory ")
    assert memory.endswith(" MiB")
    assert "2/2" in err
    assert "it/s" in err


def test_quiet_says_nothing(fake, capsys):
    assert cli.txt2img(["--prompt", "a dragon", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_batches_have_consecutive_seeds_and_a_grid(fake):
    argv = ["-p", "a", "--n_iter", "2", "--n_samples", "3", "--seed", "5", "--outdir", "o"]
    assert cli.txt2img(argv) == 0
    assert [request.seeds for request in fake.requests] == [(5, 6, 7), (8, 9, 10)]
    assert files("o") == ["grid-0000.png", *(f"samples/{k:05d}.png" for k in range(6))]
    assert [read_request(f"o/samples/{k:05d}.png").seeds for k in range(6)] == [(5 + k,) for k in range(6)]
    with Image.open("o/grid-0000.png") as sheet, Image.open("o/samples/00004.png") as fifth:
        assert sheet.size == (3 * 26 + 2, 2 * 18 + 2)
        assert np.array_equal(sheet.crop((28, 20, 52, 36)), fifth)


def test_n_rows_is_compvis_n_rows(fake):
    assert cli.txt2img(["-p", "a", "--n_samples", "4", "--n_rows", "2", "--outdir", "o"]) == 0
    with Image.open("o/grid-0000.png") as sheet:
        assert sheet.size == (2 * 26 + 2, 2 * 18 + 2)


def test_a_large_run_gets_several_grids(fake, monkeypatch):
    monkeypatch.setattr(drawing, "GRID_LIMIT", 4)
    assert cli.txt2img(["-p", "a", "--n_samples", "2", "--n_iter", "3", "--outdir", "o", "--skip_save"]) == 0
    assert files("o") == ["grid-0000.png", "grid-0001.png"]


def test_fixed_code_gives_every_batch_the_same_seeds(fake):
    assert cli.txt2img(["-p", "a", "-b", "2", "--n_samples", "2", "--fixed_code", "--skip_grid"]) == 0
    assert [request.seeds for request in fake.requests] == [(42, 43), (42, 43)]


def test_a_negative_seed_is_random_but_told(fake, capsys):
    for _ in range(2):
        assert cli.txt2img(["-p", "a", "-s", "-1"]) == 0
    first, second = (request.seeds[0] for request in fake.requests)
    assert first != second
    assert f"seed {first}" in capsys.readouterr().out


def test_skip_save_and_skip_grid(fake):
    argv = ["-p", "a", "--n_samples", "2"]
    assert cli.txt2img([*argv, "--skip_grid", "--outdir", "a"]) == 0
    assert cli.txt2img([*argv, "--skip_save", "--outdir", "b"]) == 0
    assert files("a") == ["samples/00000.png", "samples/00001.png"]
    assert files("b") == ["grid-0000.png"]


def test_numbers_go_on(fake):
    for _ in range(2):
        assert cli.txt2img(["-p", "a", "--n_samples", "2", "--outdir", "o"]) == 0
    assert files("o") == ["grid-0000.png", "grid-0001.png", *(f"samples/{k:05d}.png" for k in range(4))]


def test_output_names_the_one_file_and_replaces_it(fake):
    Path("deep").mkdir()
    Path("deep/a.png").write_text("old")
    assert cli.txt2img(["-p", "a boat", "-o", "deep/a.png"]) == 0
    assert files(".") == ["deep/a.png"]
    assert read_request("deep/a.png").prompt == "a boat"


@pytest.mark.parametrize("source", ["prompts.txt", "-"])
def test_prompts_from_a_file(fake, monkeypatch, source):
    text = "a red boat\r\n\n  \nein Schloß am Fluß\n"
    Path("prompts.txt").write_text(f"\ufeff{text}", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert cli.txt2img(["--from-file", source, "--n_iter", "2"]) == 0
    assert [(request.prompt, request.seeds) for request in fake.requests] == [
        ("a red boat", (42,)),
        ("a red boat", (43,)),
        ("ein Schloß am Fluß", (44,)),
        ("ein Schloß am Fluß", (45,)),
    ]


def test_unknown_words_are_told_once_for_the_embedded_model_only(fake, capsys):
    Path("p").write_text("a dragon by a castle\na dragon\na boat\n")
    assert cli.txt2img(["--from_file", "p"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "never seen" in line]
    assert told == [
        "the embedded model has never seen: dragon, castle (use --model FOLDER to draw with another one)"
    ]
    assert cli.txt2img(["-p", "a dragon", "--model", "postcard"]) == 0
    assert "never seen: dragon (" in capsys.readouterr().err
    assert cli.txt2img(["-p", "a boat"]) == 0
    assert cli.txt2img(["-p", "a dragon", "--model", "mine"]) == 0
    assert "never seen" not in capsys.readouterr().err


def test_latent_shape_flags_may_agree_with_the_model(fake, capsys):
    assert cli.txt2img(["-p", "a", "--C", "4", "--f", "8"]) == 0
    assert cli.txt2img(["-p", "a", "--f", "16"]) == 2
    assert "--f 16 does not fit this model, which has 8" in capsys.readouterr().err


# --- stopping and failing, with the fake ---


def test_ctrl_c_keeps_finished_pictures(fake, capsys):
    fake.fail_at, fake.error = 8, KeyboardInterrupt()  # in the third of four batches
    assert cli.txt2img(["-p", "a", "--n_iter", "4", "--outdir", "o"]) == 130
    assert files("o") == ["samples/00000.png", "samples/00001.png"]
    assert [read_request(f"o/samples/0000{k}.png").seeds for k in range(2)] == [(42,), (43,)]
    assert "stopped; finished pictures are kept" in capsys.readouterr().err


def test_our_own_errors_are_one_line_and_exit_code_1(fake, capsys):
    fake.fail_at, fake.error = 2, IndexError("list index out of range\nmore")
    assert cli.txt2img(["-p", "a", "--quiet", "--outdir", "o"]) == 1
    assert capsys.readouterr().err == (
        "txt2img: internal error: IndexError: list index out of range "
        "(please report it, with what --debug shows)\n"
    )
    assert not Path("o").exists()


def test_debug_shows_the_traceback(fake, capsys):
    fake.fail_at, fake.error = 2, IndexError("deep inside")
    assert cli.txt2img(["-p", "a", "--quiet", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in draw_images" in err


def test_what_is_not_allowed_is_called_by_its_flag(fake, capsys):
    assert cli.txt2img(["-p", "a", "--steps", "0", "-W", "100"]) == 2
    told = capsys.readouterr().err
    assert "; --steps 0 is not allowed" in told
    assert "--width 100 is not allowed" in told
    assert command.in_flags("mask_image is not allowed here: only x can").startswith("--mask is not")
    assert command.in_flags("a.png: height is not allowed") == "a.png: height is not allowed"


@pytest.mark.parametrize(
    ("typed", "meant"), [("--stepz", "--steps"), ("--negativ_prompt=x", "--negative-prompt")]
)
@pytest.mark.parametrize(("command", "prog"), [(cli.txt2img, "txt2img"), (cli.main, "ldm txt2img")])
def test_a_misspelt_flag_gets_the_nearest(command, prog, typed, meant, capsys):
    with pytest.raises(SystemExit):
        command([*prog.split()[1:], "-p", "a", typed])
    told = capsys.readouterr().err
    assert told.startswith(f"{prog}: unrecognized arguments: {typed.replace('_', '-')}")
    assert f"did you mean {meant}?" in told


def test_a_full_disk_is_the_users_to_put_right():
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert command.verdict(error) == ("no space left on the disk", 2)


def test_ctrl_c_where_nothing_is_drawn(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.images.png.read_request", stop)
    assert cli.main(["info", "a.png"]) == 130
    assert capsys.readouterr().err == "stopped; nothing half-written is left\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_the_users_to_put_right(fake, capsys, error):
    fake.fail_at, fake.error = 1, error
    assert cli.txt2img(["-p", "a", "--quiet", "--n_samples", "2"]) == 2
    assert capsys.readouterr().err == (
        "txt2img: not enough memory for 2 pictures of 24x16: ask for smaller ones, or fewer at once\n"
    )


def test_a_batch_that_memory_cannot_hold_is_refused(fake, capsys):
    assert cli.txt2img(["-p", "a", "-W", "4096", "-H", "4096", "--n_samples", "5"]) == 2
    assert "5 pictures of 4096x4096 are too many for one batch: ask for at most 4" in capsys.readouterr().err
    assert fake.requests == []


def test_warnings_are_one_line(fake, capsys, monkeypatch):
    def resolve(request):
        warnings.warn("the grid starts at t <= 1", stacklevel=2)
        return FakePipeline.resolve(fake, request)

    monkeypatch.setattr(fake, "resolve", resolve)
    assert cli.txt2img(["-p", "a", "-q"]) == 0
    assert "txt2img: warning: the grid starts at t <= 1\n" in capsys.readouterr().err


# --- info and redraw, with the fake ---


def test_info_prints_the_request(fake, capsys):
    cli.txt2img(["-p", "a boat", "-s", "7", "-o", "a.png", "--quiet"])
    assert cli.main(["info", "a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "prompt: a boat" in lines
    assert "seeds: (7,)" in lines
    assert "num_inference_steps: 3" in lines


def test_redraw_says_whether_the_pixels_are_equal(fake, capsys):
    assert cli.main(["txt2img", "-p", "a boat", "-s", "7", "-o", "a.png"]) == 0
    capsys.readouterr()
    assert cli.main(["redraw", "a.png", "-o", "b.png"]) == 0
    assert capsys.readouterr().out == "equal: every pixel\n"
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert np.array_equal(a, b)
        changed = a.copy()
    changed.putpixel((3, 2), (0, 0, 0))
    save_png(changed, Path("a.png"), read_request("a.png"))
    assert cli.main(["redraw", "a.png"]) == 1
    told = capsys.readouterr()
    assert "different: 1 of 384 pixels" in told.out
    assert "note" not in told.err
    fake.model_hash = "another"
    cli.main(["redraw", "a.png"])
    assert (
        "was drawn by fake (0123456789), not fake (another); give its model by --model"
        in capsys.readouterr().err
    )


def test_redraw_of_a_picture_without_a_request(fake, capsys):
    Image.new("RGB", (8, 8)).save("a.png")
    assert cli.main(["redraw", "a.png"]) == 2
    assert "does not say how it was drawn" in capsys.readouterr().err


# --- with a real, tiny model -----------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_folder, tmp_path, monkeypatch):
    """The flags of a quick picture; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    return ["-p", "the red boat", "-m", str(tiny_folder), "--steps", "3", "--dtype", "fp32"]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_embedded_model_tells_words_it_has_never_seen(tiny, tiny_folder, monkeypatch, capsys):

    folder = Path("embedded")
    shutil.copytree(tiny_folder, folder)
    (folder / "words.txt").write_text("a\nred\nboat\n")
    monkeypatch.setattr("ldm.pipeline.pipeline.embedded", lambda: folder)
    assert cli.txt2img(["-p", "A red dragon, a boat", "--steps", "1", "-o", "a.png"]) == 0
    assert "never seen: dragon (use --model" in capsys.readouterr().err
    assert cli.txt2img(["-p", "A red boat", "--steps", "1", "-o", "a.png"]) == 0
    assert "never seen" not in capsys.readouterr().err


def test_the_same_command_twice_gives_the_same_pixels(tiny, capsys):
    for folder in ("a", "b"):
        assert cli.txt2img([*tiny, "--n_samples", "2", "--outdir", folder]) == 0
    for k in range(2):
        assert np.array_equal(pixels(f"a/samples/0000{k}.png"), pixels(f"b/samples/0000{k}.png"))
    assert not np.array_equal(pixels("a/samples/00000.png"), pixels("a/samples/00001.png"))
    assert "3/3" in capsys.readouterr().err


def test_the_picture_is_the_one_that_python_draws(tiny, tiny_folder):
    assert cli.txt2img([*tiny, "--sampler", "DPM++ 2M Karras", "--scale", "5", "-s", "9", "-o", "a.png"]) == 0
    pipe = ldm.load(tiny_folder, dtype="fp32")
    image = pipe(
        "the red boat", num_inference_steps=3, guidance_scale=5, seed=9, sampler="dpmpp_2m", spacing="karras"
    ).images[0]
    assert np.array_equal(pixels("a.png"), image)


def test_a_batch_gives_the_pictures_that_are_drawn_alone(tiny):
    assert cli.txt2img([*tiny, "--n_samples", "3", "--outdir", "all", "--eta", "1", "--sampler", "ddim"]) == 0
    for k in range(3):
        alone = ["-s", str(42 + k), "-o", f"{k}.png", "--eta", "1", "--sampler", "ddim"]
        assert cli.txt2img([*tiny, *alone]) == 0
        together = pixels(f"all/samples/0000{k}.png").astype(int)
        assert np.abs(together - pixels(f"{k}.png")).max() <= 1  # a level of rounding


def test_the_png_holds_the_whole_request_and_redraws(tiny, tiny_folder, capsys):
    assert cli.txt2img([*tiny, "-s", "9", "--sampler", "euler_a", "-o", "a.png", "-n", "sea"]) == 0
    request = read_request("a.png")
    assert request.model == "tiny"
    drawn = (
        request.prompt,
        request.negative_prompt,
        request.seeds,
        request.num_inference_steps,
        request.sampler,
    )
    assert drawn == ("the red boat", "sea", (9,), 3, "euler_a")
    assert None not in (request.height, request.width, request.guidance_scale)
    with Image.open("a.png") as image:
        assert image.size == (request.width, request.height)
        assert image.text["parameters"].startswith(
            "the red boat\nNegative prompt: sea\nSteps: 3, Sampler: Euler a, "
        )
    capsys.readouterr()
    assert cli.main(["redraw", "a.png", "-m", str(tiny_folder), "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out == "equal: every pixel\n"
    save_png(Image.open("a.png"), Path("a.png"), request.replace(seeds=(10,)))
    assert cli.main(["redraw", "a.png", "-m", str(tiny_folder), "--dtype", "fp32"]) == 1
    assert "different: " in capsys.readouterr().out


def test_ctrl_c_inside_the_real_pipeline(tiny, monkeypatch):
    from ldm.pipeline import networks

    steps, decode = [], networks.decode

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(networks, "decode", interrupted)
    assert cli.txt2img([*tiny, "--n_iter", "4", "--outdir", "o"]) == 130
    assert files("o") == ["samples/00000.png", "samples/00001.png"]
    for name in files("o"):
        pixels(Path("o", name))


def test_every_sampler_and_spacing_draws(tiny, capsys):
    from ldm.diffusion.samplers import SAMPLERS, SPACINGS

    for name in SAMPLERS:
        assert cli.txt2img([*tiny, "--sampler", name, "--outdir", "o"]) == 0
        labelled = read_request(max(Path("o/samples").iterdir()))
        assert labelled.sampler == name
    for name in SPACINGS:
        assert cli.txt2img([*tiny, "--sampler", "euler", "--scheduler", name, "--outdir", "p"]) == 0
    written = [read_request(path).spacing for path in sorted(Path("p/samples").iterdir())]
    assert written == list(SPACINGS)
    assert "Traceback" not in capsys.readouterr().err
