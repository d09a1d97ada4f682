"""Edges' F-score against what it is by hand, and the comparison on a tiny random model."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_folder

import ldm
from ldm.checkpoint import save_module
from ldm.errors import UserError
from ldm.models import ControlNet
from ldm.postcards.comparisons import control
from ldm.postcards.comparisons.control import AUTOENCODER, WITHOUT, edge_scores, make_case, measure_keeping
from ldm.postcards.scoring.agreement import names
from ldm.postcards.scoring.scorer import Scorer
from ldm.preprocess import preprocess

ROOT = Path(__file__).parents[3]
pytest.importorskip("cv2", reason="no OpenCV: pip install 'ldm[control]'", exc_type=ImportError)


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return Scorer(replace(names(), widths=(32, 32, 32, 32))).eval()


def lines(*columns, side=40):
    """Vertical lines, as preprocessors draw them."""
    picture = np.zeros((1, side, side, 3), np.uint8)
    picture[0, :, list(columns)] = 255
    return picture


@pytest.mark.parametrize(
    ("given", "found", "score"),
    [
        ((10,), (10,), 1.0),
        ((10,), (12,), 1.0),  # two pixels off
        ((10,), (13,), 0.0),
        ((10, 20), (10,), 2 * 1 * 0.5 / 1.5),  # half of what is given is found
        ((10,), (10, 20, 30), 2 * (1 / 3) / (4 / 3)),  # a third of what is found is given
        ((), (), 1.0),
        ((10,), (), 0.0),
        ((), (10,), 0.0),
    ],
)
def test_the_score_is_that_of_precision_and_recall(given, found, score):
    assert edge_scores(lines(*given), lines(*found)).tolist() == pytest.approx([score])


def test_a_case_has_the_edges_of_its_renders():
    case = make_case(3, 64)
    assert case.sources.shape == case.edges.shape == (3, 64, 64, 3)
    assert np.array_equal(case.edges[1], preprocess(case.sources[1], "canny"))
    with pytest.raises(UserError, match="--n must be from 2 to 1000"):
        make_case(1)


def test_gain_and_loss_are_of_pairs(scorer, monkeypatch):
    """Renders themselves keep all edges; grey pictures none."""
    case = make_case(4, 64)
    answers = {id(case.sources): [True, True, False, True]}
    reading = control.right
    monkeypatch.setattr(
        control, "right", lambda s, p, x: (answers.get(id(x), [False] * 4), reading(s, p, x)[1])
    )
    ways = {WITHOUT: case.sources, "grey": np.full_like(case.sources, 128)}
    found = measure_keeping(scorer, case, ways)
    assert found[WITHOUT].edges.mean == 1
    assert found[WITHOUT].gain.mean == found[WITHOUT].lost.mean == 0
    assert found[WITHOUT].frechet == pytest.approx(0, abs=1e-4)
    assert found["grey"].edges.mean == 0
    assert found["grey"].gain.mean == -1
    assert found["grey"].lost.mean == 75
    assert found["grey"].following.right == 0


def test_the_script_compares(scorer, tmp_path, monkeypatch, capsys):
    """A ControlNet of zeros draws what is drawn without one."""
    make_folder(tmp_path / "model")
    scorer.save(tmp_path / "scorer")
    pipe = ldm.load(tmp_path / "model", dtype="fp32", device="cpu")
    widths = (16, 32, 96, 256)[: pipe.vae.downscale.bit_length()]
    save_module(
        ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=widths), tmp_path / "control"
    )
    argv = ["--control", tmp_path / "control", "--model", tmp_path / "model", "--n", "2", "--steps", "2"]
    argv += ["--scorer", tmp_path / "scorer", "--sampler", "euler"]
    argv += ["--out", tmp_path / "out.json", "--sheet", tmp_path / "sheet.png", "--strength", "1", "0.5"]
    monkeypatch.setattr(sys, "argv", ["compare_control.py", *map(str, argv)])
    runpy.run_path(str(ROOT / "scripts" / "compare_control.py"), run_name="__main__")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["found"]
    assert [*found] == [WITHOUT, "with control, scale 1", "with control, scale 0.5", AUTOENCODER]
    assert found["with control, scale 1"] == found[WITHOUT]
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert Image.open(tmp_path / "sheet.png").size == (5 * 18 + 2, 2 * 18 + 2)
