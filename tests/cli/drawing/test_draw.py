"""`txt2img`, in this process: first with a pipeline that costs nothing, then with a real tiny model."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_pipeline import files
from PIL import Image

import ldm
from ldm import cli
from ldm.cli.drawing import output
from ldm.images.png import read_request
from ldm.request import Request

# --- with the fake -----------------------------------------------------------------------------------------


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
    monkeypatch.setattr(output, "GRID_LIMIT", 4)
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
    Path("deep/a.png").write_text("old", encoding="utf-8")
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


@pytest.mark.parametrize("source", ["prompts.txt", "-"])
def test_lines_of_prompts_end_at_newlines_only(fake, monkeypatch, source):
    prompts = ["a\u2028b", "a\x0cb", "a\x85b\x0b\x1cc", "\u2029a\rb\x1e"]
    data = "\r\n".join(prompts[:2]).encode() + b"\n" + "\n".join(prompts[2:]).encode()
    Path("prompts.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert cli.txt2img(["--from-file", source, "-q"]) == 0
    assert [request.prompt for request in fake.requests] == prompts


def test_unknown_words_are_told_once_by_models_that_know_their_world_only(fake, capsys, monkeypatch):
    Path("p").write_text("a dragon by a castel\na dragon\na boat\n", encoding="utf-8")
    assert cli.txt2img(["--from_file", "p"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "never seen" in line]
    assert told == [
        "fake has never seen: dragon, castel (nearest: castle); txt2img --list-things tells what it has, "
        "--model FOLDER draws with another one"
    ]
    assert cli.txt2img(["-p", "a boat"]) == 0
    assert cli.txt2img(["-p", "a dragon", "-q"]) == 0
    monkeypatch.setattr(type(fake), "world", None)
    assert cli.txt2img(["-p", "a dragon"]) == 0
    assert "never seen" not in capsys.readouterr().err


# --- with a real, tiny model -----------------------------------------------------------------------------


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_what_is_drawn_as_something_else_is_told_and_kept(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("small")
    shutil.copytree(tiny_folder, folder)
    (folder / "words.txt").write_text("a\nred\nboat\n")
    (folder / "world.json").write_text('{"things": [[["boat", "boats"]]], "words": {"ark": "boat"}}')
    quick = ["-m", str(folder), "--steps", "1", "--dtype", "fp32"]
    assert cli.txt2img(["-p", "A red dragon, an (ark:1.2)", *quick, "-o", "a.png"]) == 0
    err = capsys.readouterr().err
    assert "ark: drawn as a boat\n" in err
    assert "small has never seen: dragon; txt2img" in err
    assert read_request("a.png").prompt == "A red dragon, an (ark:1.2)"
    assert cli.txt2img(["-p", "A red dragon, a (boat:1.2)", *quick, "-o", "b.png"]) == 0
    assert "drawn as" not in capsys.readouterr().err
    np.testing.assert_array_equal(pixels("a.png"), pixels("b.png"))
    (folder / "world.json").write_text(
        '{"things": [[["boat", "boats"]], [["cat", null]]], "words": {"ark": "cat"}}'
    )
    assert cli.main(["redraw", "a.png", *quick[:2], "--dtype", "fp32"]) == 0  # by what it says, not the table
    assert cli.txt2img(["--from-png", "a.png", "-p", "an ark", *quick[:2], "-o", "c.png"]) == 0
    assert read_request("c.png").drawn_as == (("ark", "cat"),)
    assert cli.txt2img(["-p", "A red dragon, an (ark:1.2)", *quick, "-o", "d.png", "--as-written"]) == 0
    assert read_request("d.png").drawn_as == ()
    assert (pixels("d.png") != pixels("a.png")).any()


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


def test_a_batch_gives_the_pictures_that_are_drawn_alone(tiny, loaded_once):
    assert cli.txt2img([*tiny, "--n_samples", "3", "--outdir", "all", "--eta", "1", "--sampler", "ddim"]) == 0
    for k in range(3):
        alone = ["-s", str(42 + k), "-o", f"{k}.png", "--eta", "1", "--sampler", "ddim"]
        assert cli.txt2img([*tiny, *alone]) == 0
        together = pixels(f"all/samples/0000{k}.png").astype(int)
        assert np.abs(together - pixels(f"{k}.png")).max() <= 1  # a level of rounding


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


def test_every_sampler_and_spacing_draws(tiny, loaded_once, capsys):
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
