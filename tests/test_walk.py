"""A reader who follows one prompt through the code is not sent to and fro."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "walk.py"


def test_a_prompt_is_followed_through_few_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(SCRIPT), run_name="walk")
    argv = ["-p", "a red boat", "--steps", "1", "-q", "-o", "a.png", "--device", "cpu", "--dtype", "fp32"]
    visits = script["visits"](script["walk"](argv))
    files = [file for file, _ in visits]
    assert files[0] == "cli/drawing/draw.py"
    rooms = {"pipeline/deciding/prepare.py", "pipeline/sample.py", "diffusion/solvers.py", "images/png.py"}
    assert rooms <= set(files)
    assert len(files) - 1 <= 30, "\n".join(files)
