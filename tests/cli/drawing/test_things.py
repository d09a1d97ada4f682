"""`txt2img --list-things`: without torch, and for models that say nothing."""

import subprocess
import sys
from pathlib import Path

from ldm import cli


def test_the_embedded_models_world_is_printed_without_torch():
    code = (
        "import sys; from ldm.cli import txt2img; txt2img(['--list-things']); "
        "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("things (14): house (cottage, home")
    assert "weathers: clear, cloudy, rain, snow" in lines
    assert lines[-1] == "False True"


def test_models_that_do_not_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert cli.txt2img(["--list-things", "-m", "mine"]) == 2
    assert "mine does not say what it can draw: it has no world.json" in capsys.readouterr().err
    told = '{"things": [[["dog", "dogs"], ["hound", null]]], "styles": ["3d"]}'
    Path("mine/world.json").write_text(told, encoding="utf-8")
    assert cli.txt2img(["--list-things", "-m", "mine"]) == 0
    assert capsys.readouterr().out == "things (1): dog (hound)\nstyles: 3d\n"
