"""Measures of filled masks against what they are by hand, and the comparison on tiny random models."""

import json
import random
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
from ldm import postcards
from ldm.checkpoint import load_parts, save_folder
from ldm.dataset.examine import examine
from ldm.errors import UserError
from ldm.evaluate.distances import frechet_distance
from ldm.finetune.inpainting import widen
from ldm.postcards.comparisons import inpainting
from ldm.postcards.comparisons.inpainting import (
    Case,
    Mean,
    border_psnr,
    follow,
    make_case,
    measure_filling,
    seam,
)
from ldm.postcards.scoring.agreement import names
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import Settings, rendered
from ldm.runtime import Runtime

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return Scorer(replace(names(), widths=(32, 32, 32, 32))).eval()


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(inpainting, "RESAMPLES", 10)


def square_case():
    """A mask of 20 x 20 in the corner of a grey picture: only two of its sides are edges."""
    masks = np.zeros((1, 32, 32), bool)
    masks[0, :20, :20] = True
    return Case([], np.full((1, 32, 32, 3), 100, np.uint8), masks)


def test_the_border_is_inside_the_mask_along_what_is_kept():
    case = square_case()
    image = case.sources.copy()
    image[0, :14, :14] = 0  # beyond the band
    image[0, 20:] = 255  # outside
    assert border_psnr(case, image)[0] == 60
    image[0, 14:20, :20] = image[0, :14, 14:20] = 110
    assert border_psnr(case, image)[0] == pytest.approx(10 * np.log10(255**2 / 100))
    image[0, 14:, :20] = 100  # six of the band's columns of 14, beside six of its rows of 20
    off = 100 * 14 * 6 / (14 * 6 + 20 * 6)
    assert border_psnr(case, image)[0] == pytest.approx(10 * np.log10(255**2 / off))


def test_a_seam_is_the_step_across_the_edge_beyond_the_pictures_own():
    case = square_case()
    image = case.sources.copy()
    assert seam(case, image)[0] == 0
    image[0, :20, :20] = 130
    assert seam(case, image)[0] == 30
    image[0, 5, 5] = 0  # not at the edge
    assert seam(case, image)[0] == 30
    step = case.sources.copy()
    step[0, :20, :20] = 130
    assert seam(Case([], step, case.masks), image)[0] == 0


def test_masks_are_of_their_kind():
    box, strokes, half = (make_case(kind, 8) for kind in inpainting.KINDS)
    for mask, prompt in zip(box.masks, box.prompts, strict=True):
        alone = postcards.object_mask(postcards.Scene("sea", "day", "clear", prompt.scene.groups[:1], 0), 128)
        assert not (alone & ~mask).any()
        assert mask.mean() < 0.8
        cells = mask.reshape(16, 8, 16, 8)
        assert np.array_equal(cells.any((1, 3)), cells.all((1, 3)))
    assert half.masks.mean((1, 2)).tolist() == [0.5] * 8
    assert [bool(mask[0, 0]) for mask in half.masks] == [True, False, True, False] * 2
    assert half.masks[2][:64].all()
    assert (strokes.masks.mean((1, 2)) > 0.001).all()
    assert (strokes.masks.mean((1, 2)) < 0.9).all()
    assert np.array_equal(box.sources, rendered(box.prompts))
    assert all(prompt.scene.groups for prompt in box.prompts)


def test_a_mean_has_its_interval():
    values = np.random.default_rng(0).normal(3, 2, (4000, 50))
    found = [Mean.of(row) for row in values]
    inside = np.mean([abs(each.mean - 3) < each.half for each in found])
    assert 0.92 < inside < 0.96  # the normal's quantile for 50 values
    assert str(Mean(1.234, 0.05)) == "1.23 ± 0.05"


def test_a_better_filling_has_better_figures(scorer):
    case = make_case("box", 12)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 30, case.sources.shape)
    worse = case.compose((case.sources + noise).clip(0, 255).astype(np.uint8))
    better = case.compose((case.sources + noise / 4).clip(0, 255).astype(np.uint8))
    assert (worse[~case.masks] == case.sources[~case.masks]).all()
    found = measure_filling(scorer, case, {"worse": worse, "better": better, "itself": case.sources})
    assert found["worse"].gain == Mean(0.0, 0.0)
    assert found["worse"].closer == (0.0, 0.0)
    gain = border_psnr(case, better) - border_psnr(case, worse)
    assert found["better"].gain == Mean.of(gain)
    assert found["better"].gain.mean - found["better"].gain.half > 8
    assert found["better"].seam.mean < found["worse"].seam.mean
    assert found["better"].closer[0] > 0
    renders = scorer.read(case.sources).features
    assert found["better"].frechet == pytest.approx(frechet_distance(scorer.read(better).features, renders))
    assert found["itself"].border.mean == 60
    assert found["itself"].seam.mean == 0
    assert abs(found["itself"].frechet) < 1e-4


def test_all_that_is_said_must_be_there():
    real = Scorer.load(ROOT / "weights" / "postcard-eval")
    prompts = evaluation_prompts(8)
    assert follow(real, prompts, rendered(prompts))[0].right >= 7
    assert follow(real, prompts, rendered(evaluation_prompts(8, held_out=True)))[0].right <= 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_folder(folder / "base")
    save_folder(
        folder / "trained", widen(load_parts(folder / "base", Runtime(torch.device("cpu"), torch.float32)))
    )
    return folder


def test_both_are_drawn_of_the_same_seeds(models):
    pipes = {name: ldm.load(models / name, dtype="fp32", device="cpu") for name in ("base", "trained")}
    case = make_case("half", 3, 16)
    ways = inpainting.fill(pipes, case, Settings(2, guidance_scale=2.0, batch_size=2), controls=True)
    hint = "base, the picture itself beneath"
    larger = "base, the mask a cell larger"
    assert list(ways) == ["base", "trained", larger, hint, "its autoencoder alone"]
    wide = np.zeros((16, 16), bool)
    wide[:, :10] = True  # the first's left half, and a cell of two pixels
    given = {"image": Image.fromarray(case.shown[0]), "mask_image": wide}
    (alone,) = pipes["base"](
        case.prompts[0].text, seed=0, num_inference_steps=2, guidance_scale=2.0, **given
    ).images
    assert np.abs(np.asarray(alone)[:, :8].astype(int) - ways[larger][0][:, :8]).max() <= 1
    assert np.array_equal(ways[larger][0][:, 8:], case.sources[0][:, 8:])
    assert np.array_equal(case.shown[1, :, :8], case.sources[1, :, :8])  # its right half is hidden
    assert np.array_equal(case.shown[1, :, 8:], case.sources[0, :, 8:])
    for i, prompt in enumerate(case.prompts):
        given = {"image": Image.fromarray(case.shown[i]), "mask_image": case.masks[i]}
        assert (ways[hint][i] != ways["base"][i]).any()
        for name, pipe in pipes.items():
            (alone,) = pipe(prompt.text, seed=i, num_inference_steps=2, guidance_scale=2.0, **given).images
            filled = np.where(case.masks[i][..., None], np.asarray(alone), case.sources[i])
            assert np.abs(filled.astype(int) - ways[name][i]).max() <= 1


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


def test_the_command_writes_table_and_sheet(models, scorer, tmp_path, monkeypatch, capsys):
    scorer.save(tmp_path / "scorer")
    out, picture = tmp_path / "figures.json", tmp_path / "sheet.webp"
    arguments = ["--model", models / "base", "--trained", models / "trained", "--n", 2, "--steps", 1]
    arguments += ["--scorer", tmp_path / "scorer", "--sampler", "euler"]
    run(monkeypatch, "compare_inpainting.py", *arguments, "--out", out, "--sheet", picture)
    figures = json.loads(out.read_text(encoding="utf-8"))["found"]
    assert list(figures) == list(inpainting.KINDS)
    trained = figures["half"]["trained on masks"]
    assert f"| trained on masks | {Mean(**trained['border'])} |" in capsys.readouterr().out
    with Image.open(picture) as sheet:
        assert sheet.size == (8 * (16 + 2) + 2, 3 * (16 + 2) + 2)


def test_too_few_pictures_are_told():
    with pytest.raises(UserError, match=r"--n must be from 2 to \d+ \(got 1\)"):
        make_case("box", 1)


def test_a_folder_of_postcards_can_be_trained_on(tmp_path, monkeypatch):
    run(monkeypatch, "render_postcards.py", tmp_path / "cards", "--count", 3, "--seed", 5)
    found = examine(tmp_path / "cards")
    assert found.can_train
    rng = random.Random("postcard 5 2")
    scene = postcards.sample_scene(rng)
    assert found.examples[2].caption == postcards.caption(scene, rng)
    with Image.open(found.examples[2].path) as picture:
        assert np.array_equal(np.asarray(picture), postcards.render(scene))
