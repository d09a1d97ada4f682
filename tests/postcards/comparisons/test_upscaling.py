"""The measure of upscalers: bicubic and edges against what they are, the table against pictures."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import make_folder
from tiny_upscaler import upscaler_parts

import ldm
from ldm.checkpoint import save_folder
from ldm.errors import UserError
from ldm.evaluate.distances import psnr
from ldm.postcards.comparisons.upscaling import bicubic, edges, measure_upscaler
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.sources import rendered

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "upscaler", upscaler_parts(folder / "tokenizer"))
    make_folder(folder / "base")
    return folder


def test_edges_of_stripes_are_their_steps():
    stripes = np.zeros((2, 8, 8, 3), np.uint8)
    stripes[0, :, ::2] = 100  # a step of 100 between all columns, none between rows
    assert edges(stripes).tolist() == [50.0, 0.0]


def test_bicubic_keeps_a_flat_picture_and_is_pillow_s():
    rng = np.random.default_rng(0)
    images = np.stack([np.full((8, 8, 3), 77, np.uint8), rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)])
    grown = bicubic(images, 16)
    assert (grown[0] == 77).all()
    again = Image.fromarray(images[1]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(grown[1], np.asarray(again))


def test_the_table_says_what_pictures_show(models):
    pipe, base = (ldm.load(models / name, dtype="fp32") for name in ("upscaler", "base"))
    prompts = evaluation_prompts(2, held_out=True)
    found, pictures = measure_upscaler(pipe, base, prompts, [1, 2])
    assert list(found["renders"]) == ["bicubic", "1 step", "2 steps", "its autoencoder alone"]
    side = base.resolve(ldm.Request()).height
    small, large = rendered(prompts, side), rendered(prompts, 2 * side)
    plain = psnr(bicubic(small, 2 * side), large)
    assert found["renders"]["bicubic"].psnr == pytest.approx(plain.mean())
    assert found["renders"]["bicubic"].gain == 0
    made = [  # in two steps, its default
        pipe(prompt.text, image=Image.fromarray(each), seed=i).images[0]
        for i, (prompt, each) in enumerate(zip(prompts, small, strict=True))
    ]
    drawn = np.stack([np.asarray(each) for each in made])
    assert found["renders"]["2 steps"].psnr == pytest.approx(psnr(drawn, large).mean())
    assert found["renders"]["2 steps"].gain == pytest.approx((psnr(drawn, large) - plain).mean())
    sharpness = edges(drawn).mean() / edges(large).mean()
    assert abs(sharpness - (edges(drawn) / edges(large)).mean()) > 1e-4  # not the same
    assert found["renders"]["2 steps"].edges == pytest.approx(sharpness, rel=1e-6)
    assert np.array_equal(pictures[1], drawn[0])
    assert np.array_equal(pictures[2], large[0])
    assert found["through the VAE"]["bicubic"].psnr < found["renders"]["bicubic"].psnr


def test_a_model_that_is_no_upscaler_is_told(models):
    base = ldm.load(models / "base")
    with pytest.raises(UserError, match="base is no upscaler"):
        measure_upscaler(base, base, evaluation_prompts(1), [1])


def test_the_command_writes_figures_and_pictures(models, tmp_path, monkeypatch, capsys):
    out, png = tmp_path / "new" / "figures.json", tmp_path / "pictures.png"
    arguments = ["--model", models / "upscaler", "--base", models / "base", "--n", 1, "--steps", 1]
    arguments += ["--out", out, "--pictures", png]
    monkeypatch.setattr(sys, "argv", ["evaluate_upscaler.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate_upscaler.py"), run_name="__main__")
    figures = json.loads(out.read_text())
    assert figures["n"] == 1
    assert f"1 step: {figures['renders']['1 step']['psnr']:.2f} dB" in capsys.readouterr().out
    side = 2 * ldm.load(models / "base").resolve(ldm.Request()).height
    assert Image.open(png).size == (6 * (side + 2) + 2, side + 2 + 2)  # bicubic, drawn, rendered, twice


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n", "0"], "--n must be from 1 to 500 (got 0)"),
        (["--n", "501"], "--n must be from 1 to 500 (got 501)"),
        (["--pictures", "a.txt"], "--pictures a.txt must name a .png file"),
    ],
)
def test_what_cannot_be_measured_is_said_first(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate_upscaler.py", "--model", "nowhere", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "scripts" / "evaluate_upscaler.py"), run_name="__main__")
    assert said in capsys.readouterr().err
