"""What the commands draw with: a pipeline that costs nothing, and a real tiny model."""

import functools

import pytest
from fake_pipeline import FakePipeline

import ldm
from ldm.cli.drawing import draw as drawing
from ldm.cli.drawing import redraw as redrawing


@pytest.fixture
def fake(monkeypatch, tmp_path):
    pipe = FakePipeline()
    for module in (drawing, redrawing):
        monkeypatch.setattr(module, "load", lambda args: pipe)
    monkeypatch.setattr(drawing, "is_large", lambda jobs: None)  # it has no networks
    monkeypatch.setattr("ldm.pipeline.sample.draw_batch", pipe.draw_batch)
    monkeypatch.setattr("ldm.pipeline.deciding.prepare.prepare", FakePipeline.prepare)
    monkeypatch.chdir(tmp_path)
    return pipe


@pytest.fixture
def tiny(tiny_folder, tmp_path, monkeypatch):
    """The flags of a quick picture; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    return ["-p", "the red boat", "-m", str(tiny_folder), "--steps", "3", "--dtype", "fp32"]


@pytest.fixture
def loaded_once(monkeypatch):
    """Commands that give one model in one way share it: most of a tiny picture's time is reading it."""
    monkeypatch.setattr(ldm, "load", functools.cache(ldm.load))
