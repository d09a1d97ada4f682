"""What is taken from a reference: of renders themselves all of it; and the comparison on a tiny model."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_image_prompts import PROJECTED, make_encoder
from tiny_pipeline import make_folder

import ldm
from ldm.adapters.image_prompt import ImageAdapter, cross_layers
from ldm.adapters.projections import ImageProjection
from ldm.errors import UserError
from ldm.postcards.comparisons import image_prompt
from ldm.postcards.comparisons.image_prompt import (
    ANOTHER,
    ASKED,
    NOTHING,
    THINGS,
    make_case,
    measure,
    taken_from,
    things_named,
)
from ldm.postcards.scoring.agreement import names
from ldm.postcards.scoring.scorer import Scorer

ROOT = Path(__file__).parents[3]


def test_texts_say_nothing_the_things_alone_or_another_scene():
    case = make_case(40, 32)
    assert {each.text for each in case.texts[NOTHING]} == {""}
    for prompt, reference in zip(case.texts[THINGS], case.references, strict=True):
        assert prompt.text == things_named(reference.objects)
        assert prompt.place is prompt.time is prompt.weather is None
        assert [(each.kind, each.count, each.colour) for each in prompt.objects] == [
            (group.kind, group.count, None) for group in reference.scene.groups
        ]
    assert case.texts[ANOTHER][0] is case.references[1]
    assert case.texts[ANOTHER][-1] is case.references[0]
    assert any(" and a " in prompt.text for prompt in case.texts[THINGS])
    with pytest.raises(UserError, match="--n must be from 2 to 1000"):
        make_case(1)


def test_renders_show_what_they_show_and_no_others():
    """By the scorer that is shipped; of another scene's render, what the two have in common."""
    scorer, case = Scorer.load(ROOT / "weights" / "postcard-eval"), make_case(24)
    own = taken_from(scorer, case.references, case.pictures)
    other = taken_from(scorer, case.references, np.roll(case.pictures, 1, axis=0))
    for asked in ASKED:
        assert own[asked].share > 0.85, asked
        assert other[asked].share < 0.7, asked
    assert own["place"].n == own["hour"].n == own["weather"].n == 24
    scenes = [each.scene for each in case.references]
    pairs = zip(scenes, [scenes[-1], *scenes[:-1]], strict=True)
    assert other["place"].right == pytest.approx(sum(a.place == b.place for a, b in pairs), abs=2)


def test_what_is_lost_is_of_pairs(monkeypatch):
    case, scorer = make_case(4, 32), Scorer(replace(names(), widths=(32, 32, 32, 32))).eval()
    answers = iter(([True, True, False, True], [True, False, False, False]))
    monkeypatch.setattr(image_prompt, "right", lambda *_: (next(answers), None))
    found = measure(scorer, case, {THINGS: {"without": case.pictures, "with": case.pictures}})[THINGS]
    assert (found["without"].lost.mean, found["with"].lost.mean) == (0, 50)
    assert (found["without"].said.right, found["with"].said.right) == (3, 1)


def test_the_script_compares(tmp_path, monkeypatch, capsys):
    """An IP-Adapter of scale 0 draws what is drawn without one, and one of scale 1 does not."""
    torch.manual_seed(0)
    make_folder(tmp_path / "model")
    Scorer(replace(names(), widths=(32, 32, 32, 32))).save(tmp_path / "scorer")
    unet = ldm.load(tmp_path / "model", dtype="fp32", device="cpu").unet
    layers = cross_layers(unet)
    adapter = ImageAdapter(ImageProjection(PROJECTED, layers[0].dim, 4), layers)
    adapter.save(tmp_path / "adapter.safetensors")
    make_encoder(tmp_path / "encoder")
    argv = ["--adapter", tmp_path / "adapter.safetensors", "--image-encoder", tmp_path / "encoder"]
    argv += ["--model", tmp_path / "model", "--n", "2", "--steps", "2", "--sampler", "euler"]
    argv += ["--scorer", tmp_path / "scorer", "--strength", "0", "1"]
    argv += ["--out", tmp_path / "out.json", "--sheet", tmp_path / "sheet.png"]
    monkeypatch.setattr(sys, "argv", ["compare_image_prompt.py", *map(str, argv)])
    runpy.run_path(str(ROOT / "scripts" / "compare_image_prompt.py"), run_name="__main__")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["found"]
    assert len(found) == 9
    for text in (NOTHING, THINGS, ANOTHER):
        assert found[f"{text}, with it, scale 0"] == found[f"{text}, without"]
    assert len(capsys.readouterr().out.splitlines()) == 11
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"), int)
    assert sheet.size == (7 * 18 + 2, 2 * 18 + 2)
    assert (pixels[2:18, 20:36] != pixels[2:18, 38:54]).any(), "without and with, scale 1"
