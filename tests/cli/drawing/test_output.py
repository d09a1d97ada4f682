"""What `txt2img` writes: formats, names, labelled grids; what it finds there; what is left when it stops."""

import os
from pathlib import Path

import numpy as np
import pytest
from fake_pipeline import files
from PIL import Image

from ldm import cli
from ldm.images.png import read_request

SAMPLES = Path("o/samples")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["-o", "a.webp"], "a.webp"),
        (["-o", "a.JPG", "--quality", "80"], "a.JPG"),
        (["-o", "a.avif"], "a.avif"),
        (["--format", "webp", "--lossless", "--outdir", "o"], "o/samples/00000.webp"),
        (["--format", "jpeg", "--outdir", "o"], "o/samples/00000.jpg"),
    ],
)
def test_formats_are_read_and_redrawn(tiny, tiny_folder, capsys, argv, name):
    assert cli.txt2img([*tiny, *argv]) == 0
    assert files(".") == [name]
    request = read_request(name)
    assert (request.prompt, request.num_inference_steps, request.seeds) == ("the red boat", 3, (42,))
    capsys.readouterr()
    assert cli.main(["info", name]) == 0
    assert "num_inference_steps: 3" in capsys.readouterr().out.splitlines()
    again = cli.main(["redraw", name, "-m", str(tiny_folder), "--dtype", "fp32", "-o", "b.png"])
    told = capsys.readouterr()
    assert again == (0 if "--lossless" in argv else 1)
    assert ("equal: every pixel" in told.out) == ("--lossless" in argv)
    assert ("only PNGs surely keep every pixel" in told.err) == ("--lossless" not in argv)
    assert read_request("b.png") == request


@pytest.mark.parametrize(
    "argv",
    [
        ["-o", "a.gif"],
        ["-o", "a.png", "--format", "webp"],
        ["--quality", "90"],
        ["--format", "jpeg", "--quality", "0"],
        ["--format", "avif", "--lossless"],
        ["--name", "{sed}"],
        ["--resume", "-s", "-1"],
        ["--preview", "a.txt"],
        ["--preview", "."],
        ["--plot", "steps"],
        ["--plot", "stps=1,2"],
        ["--plot", "steps=1,2", "-b", "2"],
        ["--plot", "steps=1,2", "-o", "a.png"],
        ["--plot", "prompt s/r=blue,green"],
        ["--styles", "ink"],
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(monkeypatch, tmp_path, capsys, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.cli.drawing.draw.load", lambda args: pytest.fail("the model was loaded"))
    assert cli.txt2img(["-p", "a red boat", *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert files(".") == []


def test_names_by_a_pattern(fake):
    argv = ["-p", "a: boat?", "--n_samples", "2", "--outdir", "o", "--skip-grid"]
    assert cli.txt2img([*argv, "--name", "{model}/{seed}-{prompt:4}"]) == 0
    assert files(SAMPLES) == ["fake/42-a bo.png", "fake/43-a bo.png"]
    assert cli.txt2img([*argv, "--name", "{model}/{seed}-{prompt:4}"]) == 0
    assert files(SAMPLES / "fake") == ["42-a bo-2.png", "42-a bo.png", "43-a bo-2.png", "43-a bo.png"]
    for seed in ("5", "7"):
        assert cli.txt2img([*argv, "--name", "{counter:3} {seed}", "--format", "webp", "-s", seed]) == 0
    assert files(SAMPLES)[:4] == ["000 5.webp", "001 6.webp", "002 7.webp", "003 8.webp"]


def test_a_grid_with_labels(fake):
    argv = ["-p", "a", "--n_samples", "2", "-W", "96", "-H", "64", "--outdir"]
    assert cli.txt2img([*argv, "plain"]) == 0
    assert cli.txt2img([*argv, "o", "--grid-labels"]) == 0
    plain, labelled = pixels("plain/grid-0000.png"), pixels("o/grid-0000.png")
    assert labelled.shape[0] > plain.shape[0] + 10
    assert labelled.shape[1] == plain.shape[1]
    assert np.array_equal(labelled[2:66, 100:196], pixels("o/samples/00001.png"))
    below = labelled[66:-2, 2:98].min(2)
    assert below.min() < 64  # words
    assert (below > 200).mean() > 0.5  # on white


def test_a_full_disk_stops_with_one_line(fake, monkeypatch, capsys):
    save, written = Image.Image.save, []

    def full(self, *args, **options):
        written.append(1)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    Path("p").write_text("a\nb\nc\nd\n", encoding="utf-8")
    assert cli.txt2img(["--from-file", "p", "-q", "--outdir", "o"]) == 2
    assert capsys.readouterr().err == "txt2img: cannot write to o/samples: No space left on device\n"
    assert files("o") == ["samples/00000.png", "samples/00001.png"]


def test_ctrl_c_says_where_finished_pictures_are(fake, capsys):
    fake.fail_at, fake.error = 8, KeyboardInterrupt()  # between steps of the third of four batches
    assert cli.txt2img(["-p", "a", "-b", "4", "--outdir", "o"]) == 130
    assert files("o") == ["samples/00000.png", "samples/00001.png"]
    assert "stopped; finished pictures are kept: 2 in o/samples\n" in capsys.readouterr().err
    fake.fail_at = fake.steps + 2
    assert cli.txt2img(["-p", "a", "-b", "4", "--outdir", "p"]) == 130
    assert "stopped; finished pictures are kept: none of this run\n" in capsys.readouterr().err
    fake.fail_at = fake.steps + 8
    assert cli.txt2img(["-p", "a", "-b", "4", "--outdir", "p", "--skip-save"]) == 130
    assert files("p") == ["grid-0000.png"]
    assert "kept: sheets in p" in capsys.readouterr().err


# --- resume ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [[], ["--format", "webp"], ["--name", "{prompt}/{seed}"]])
def test_resume_draws_nothing_twice(fake, capsys, kind):
    argv = ["-p", "ein Boot ⛵", "-b", "3", "--n_samples", "2", "--outdir", "o", "--skip-grid", *kind]
    fake.fail_at, fake.error = 8, KeyboardInterrupt()
    assert cli.txt2img(argv) == 130
    before = {name: os.stat(Path("o", name)).st_mtime_ns for name in files("o")}
    assert len(before) == 4
    fake.fail_at = None
    fake.requests.clear()
    capsys.readouterr()
    assert cli.txt2img([*argv, "--resume"]) == 0
    assert "resume: 4 of 6 pictures are there already" in capsys.readouterr().out
    assert [request.seeds for request in fake.requests] == [(46, 47)]
    assert {name: os.stat(Path("o", name)).st_mtime_ns for name in before} == before
    fake.requests.clear()
    assert cli.txt2img([*argv, "--resume"]) == 0
    assert fake.requests == []
    assert len(files("o")) == 6


def test_resume_draws_what_differs_in_anything(fake):
    argv = ["-p", "a", "--outdir", "o", "-q", "--resume"]
    drawn = []
    for more in ([], [], ["--steps", "2"], ["-s", "1"], ["-n", "fog"], ["--steps", "2"]):
        fake.requests.clear()
        assert cli.txt2img([*argv, *more]) == 0
        drawn.append(len(fake.requests))
    assert drawn == [1, 0, 1, 1, 1, 0]
    fake.model_hash = "another"
    assert cli.txt2img(argv) == 0
    assert len(fake.requests) == 1


def test_resume_passes_over_strange_files(fake):
    SAMPLES.mkdir(parents=True)
    (SAMPLES / "a.png").write_bytes(b"not a picture")
    (SAMPLES / "b.jpg").write_bytes(b"")
    (SAMPLES / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(SAMPLES / "c.webp")
    assert cli.txt2img(["-p", "a", "--outdir", "o", "-q", "--resume"]) == 0
    assert len(fake.requests) == 1


def test_resume_of_equal_pictures_wants_as_many(fake):
    argv = ["-p", "a", "-b", "3", "--fixed-code", "--outdir", "o", "-q", "--skip-grid"]
    assert cli.txt2img([*argv[:2], "--outdir", "o", "-q"]) == 0
    fake.requests.clear()
    assert cli.txt2img([*argv, "--resume"]) == 0
    assert len(fake.requests) == 2


def test_resume_of_one_file(fake):
    for count in (1, 0):
        fake.requests.clear()
        assert cli.txt2img(["-p", "a", "-o", "a.webp", "-q", "--resume"]) == 0
        assert len(fake.requests) == count
