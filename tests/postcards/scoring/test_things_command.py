"""The command that scores a model of the sprites' world, on a tiny random one."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipeline import make_folder

from ldm.postcards.scoring.detector import Detector, DetectorConfig
from ldm.postcards.scoring.names import sprite_names
from ldm.postcards.sprites.scene import make_world

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_folder(folder)
    torch.manual_seed(0)
    small = {"widths": (8, 8, 16, 16), "look": (8, 8, 16, 16), "hidden": 16}
    Detector(DetectorConfig(**vars(sprite_names(make_world(50))), **small)).save(folder / "eval")
    return folder


def script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["score_sprites.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "score_sprites.py"), run_name="__main__")


def test_the_script_tells_the_figures_and_what_holds(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    where = ["--model", folder, "--scorer", folder / "eval", "--out", out]
    script(monkeypatch, *where, "--things", 50, "--limit", 6, "--repeats", 2, "--steps", 1)
    figures, said = json.loads(out.read_text()), capsys.readouterr().out
    columns = ["seen", "renders, seen", "through the VAE, seen"]
    assert [*figures["following"]][:3] == columns
    assert {"held-out", "held-out colour", "held-out place", "renders of other prompts"} <= {
        *figures["following"]
    }
    assert figures["seen"]["prompts"] == figures["held-out"]["prompts"] == 12
    asked = sum(row["n"] for row in figures["things"].values())
    assert asked >= 24
    assert all(row["n"] % 2 == 0 for row in figures["things"].values())
    holding = figures["things that hold"]
    assert holding == sum(row["right"] >= 0.7 * row["n"] for row in figures["things"].values())
    assert f"{holding} of {len(figures['things'])} things hold" in said
    assert out.with_suffix(".md").read_text().strip() in said


def test_thumbnails_need_no_scorer(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    script(
        monkeypatch,
        "--model",
        folder,
        "--thumbnails",
        "--things",
        8,
        "--limit",
        3,
        "--steps",
        1,
        "--out",
        out,
    )
    figures = json.loads(out.read_text())
    assert figures["n"] == 3
    assert len(figures["shares"]) >= 2
    assert f"{'right':16} {figures['right']:.3f}" in capsys.readouterr().out


def test_a_missing_scorer_is_told(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(monkeypatch, "--model", folder, "--scorer", tmp_path)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: no scorer in {tmp_path}")
