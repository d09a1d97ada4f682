"""--preview: each step in the terminal or in a file, never in a pipe, never at a picture's cost."""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_pipeline import files
from PIL import Image

import ldm
from ldm import cli
from ldm.images.pixels import to_pil
from ldm.request import Request


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def kitty(monkeypatch, capsys):
    """Called in a test, as pytest has a stderr of its own there: what a kitty would be sent."""

    def start():
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    for name in ("TMUX", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-kitty")
    return start


def shown(text):
    """The pictures that a kitty would have shown, each with its number."""
    found = []
    for keys, data in re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text):
        if "a=T" in keys:
            found.append([re.search("i=([0-9]+)", keys)[1], ""])
        found[-1][1] += data
    return [(number, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for number, data in found]


def steps_of(tiny_folder, seed=42):
    pipe = ldm.load(tiny_folder, dtype="fp32")
    request = Request(prompt="the red boat", num_inference_steps=3, seeds=(seed,))
    return [np.asarray(to_pil(pipe.decode(step.x0))[0]) for step in pipe.denoise(request)]


def test_the_terminal_shows_each_step(tiny, tiny_folder, kitty, capsys):
    terminal = kitty()
    assert cli.txt2img([*tiny, "-b", "2", "--preview", "--outdir", "o", "--skip-grid"]) == 0
    text, pictures = terminal.getvalue(), shown(terminal.getvalue())
    assert len(pictures) == 6
    numbers = [number for number, _ in pictures]
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3] == numbers[4] == numbers[5]
    for (_, picture), x0 in zip(pictures, [*steps_of(tiny_folder), *steps_of(tiny_folder, 43)], strict=True):
        factor = 384 // x0.shape[0]
        assert np.array_equal(picture[::factor, ::factor], x0)
    assert "batch 2/2  3/3" in text
    assert "it/s" not in text  # the bar is left out: both would move the cursor
    assert "\x1b" not in capsys.readouterr().out
    assert files("o") == ["samples/00000.png", "samples/00001.png"]


@pytest.mark.parametrize("more", [[], ["--preview", "--no-preview"], ["--preview", "-q"]])
def test_nothing_is_shown_unless_it_is_asked_for(tiny, kitty, more):
    terminal = kitty()
    assert cli.txt2img([*tiny, "-o", "a.png", *more]) == 0
    assert "\x1b_G" not in terminal.getvalue()


@pytest.mark.parametrize("terminal", ["xterm-256color", "xterm-kitty"])
def test_letters_and_pipes_get_none(tiny, monkeypatch, capsys, terminal):
    monkeypatch.setenv("TERM", terminal)  # stderr is a pipe here
    assert cli.txt2img([*tiny, "-o", "a.png", "--preview"]) == 0
    told = capsys.readouterr()
    assert "\x1b_G" not in told.err + told.out
    assert told.err.count("this terminal shows no pictures: --preview FILE") == 1
    assert "3/3" in told.err


@pytest.mark.slow
def test_a_real_pipe_gets_none(tiny):
    env = {**os.environ, "TERM": "xterm-kitty", "PYTHONPATH": str(Path(ldm.__file__).parents[1])}
    argv = [sys.executable, "-m", "ldm", "txt2img", *tiny, "-o", "a.png", "--preview"]
    done = subprocess.run(argv, capture_output=True, env=env, check=True)
    assert b"\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["p.png", "p.webp"])
def test_a_file_has_each_step_whole(tiny, tiny_folder, monkeypatch, name):
    seen, replace = [], Path.replace

    def watched(self, target):
        if Path(target).name == name:
            with Image.open(self) as image:
                seen.append(np.asarray(image.convert("RGB")))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    assert cli.txt2img([*tiny, "--preview", name, "-o", "a.png"]) == 0
    assert files(".") == ["a.png", name]
    assert len(seen) == 3
    for picture, x0 in zip(seen, steps_of(tiny_folder), strict=True):
        blocks = picture.reshape(len(x0), 384 // len(x0), len(x0), -1, 3).mean((1, 3))
        difference = np.abs(blocks - x0)
        assert difference.max() == 0 if name == "p.png" else difference.mean() < 24


def test_pictures_are_the_same_with_a_preview(tiny):
    assert cli.txt2img([*tiny, "-o", "a.png"]) == 0
    assert cli.txt2img([*tiny, "-o", "b.png", "--preview", "p.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_preview_that_cannot_be_written_costs_no_picture(tiny, monkeypatch, capsys):
    replace = Path.replace

    def locked(self, target):
        if Path(target).name == "p.png":
            raise PermissionError(13, "a viewer has it open")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", locked)
    assert cli.txt2img([*tiny, "-o", "a.png", "--preview", "p.png"]) == 0
    assert capsys.readouterr().err.count("no preview: cannot write to p.png: a viewer has it open") == 1
    assert files(".") == ["a.png"]
