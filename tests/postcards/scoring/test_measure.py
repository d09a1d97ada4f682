"""The whole measurement on a tiny random model, and the pictures that stand for the truth."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import make_tower
from tiny_pipeline import make_folder

import ldm
from ldm.diffusion.noise import Noise
from ldm.evaluate.features import ImageTower
from ldm.evaluate.reconstruction import latents_of, reconstructed
from ldm.postcards.scoring.agreement import names
from ldm.postcards.scoring.following import ATTRIBUTES
from ldm.postcards.scoring.measure import Instruments, measure
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import (
    Settings,
    denoised_from,
    drawn,
    picture_size,
    rendered,
)

ROOT = Path(__file__).parents[3]
SETTINGS = Settings(steps=2, guidance_scale=2.0, batch_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_folder(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return ldm.load(folder, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return Scorer(names()).eval()


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory, scorer):
    folder = tmp_path_factory.mktemp("instruments")
    make_tower(folder / "image_encoder")
    scorer.save(folder)
    return folder


def ignore(done):
    """Nobody watches."""


def test_pictures_do_not_depend_on_the_batch(pipe):
    prompts = evaluation_prompts(5)
    one = drawn(pipe, prompts, Settings(2, None, 2.0, batch_size=5), ignore)
    two = drawn(pipe, prompts, SETTINGS, ignore)
    assert np.abs(one.astype(int) - two).max() <= 1  # a rounding
    other = drawn(pipe, prompts, Settings(2, None, 2.0, batch_size=5, seed=100), ignore)
    assert np.abs(one.astype(int) - other).max() > 1


def test_progress_is_told(pipe):
    told = []
    drawn(pipe, evaluation_prompts(5), SETTINGS, told.append)
    assert told == [3, 5]


def test_reconstruction_is_decode_of_encode(pipe):
    images = rendered(evaluation_prompts(2))
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.decode_latents(pipe.vae.encode_latents(x)) / 2 + 0.5
    expected = (expected.clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    np.testing.assert_allclose(reconstructed(pipe, images), expected, atol=1)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_denoising_starts_from_the_renders_latents_and_the_seeds_noise(folder, sampler):
    """A U-Net that finds no noise leaves all of it: the picture is that of x0 + sigma(t) * noise."""
    pipe = ldm.load(folder, device="cpu", dtype="fp32")
    pipe.unet.conv_out.requires_grad_(False).weight.zero_()
    pipe.unet.conv_out.bias.zero_()
    prompts = evaluation_prompts(3)
    got = denoised_from(pipe, 400, prompts, Settings(2, sampler, 1.0, batch_size=2, seed=7), ignore)
    x0 = latents_of(pipe, rendered(prompts, picture_size(pipe)))
    x = x0 + float(pipe.schedule.sigma(400)) * Noise([7, 8, 9]).initial(x0.shape[1:])
    expected = (pipe.decode(x) * 255).round().permute(0, 2, 3, 1)
    np.testing.assert_allclose(got, expected, atol=1)


def test_latents_of_renders_have_the_network_s_shape(pipe):
    assert latents_of(pipe, rendered(evaluation_prompts(2), 32)).shape == (2, 4, 16, 16)


def test_measure_fills_every_column(pipe, scorer, tower_folder):
    groups = {"seen": evaluation_prompts(4), "held-out": evaluation_prompts(3, held_out=True), "none": []}
    tools = Instruments(scorer, ImageTower.find(tower_folder))
    results = measure(pipe, tools, groups, SETTINGS, start_from=[500])
    columns = [f"{title}{group}" for group in ("seen", "held-out") for title in COLUMNS]
    assert list(results.table) == columns
    for group, n in (("seen", 4), ("held-out", 3)):
        asked = [results.table[f"{title}{group}"] for title in COLUMNS]
        assert len({tuple((name, rate.n) for name, rate in column.items()) for column in asked}) == 1
        facts = results.facts[group]
        assert facts["prompts"] == len(results.pictures[group]) == n
        assert facts["cmmd_clip_other_renders"] < facts["cmmd_clip_drawn"]
        assert facts["frechet_scorer_other_renders"] < facts["frechet_scorer_drawn"]


COLUMNS = ("", "renders, ", "through the VAE, ", "from t = 500, ")


def test_the_tower_is_optional_and_gives_unit_vectors(tmp_path, tower_folder):
    assert ImageTower.find(tmp_path) is None
    embedded = ImageTower.find(tower_folder).embed(rendered(evaluation_prompts(3)), batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)


def script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")


def test_the_script_writes_figures_table_and_pictures(folder, tower_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    where = ["--model", folder, "--scorer", tower_folder, "--out", out, "--pictures", tmp_path / "pictures"]
    script(monkeypatch, *where, "--limit", 2, "--steps", 1)
    assert json.loads(out.read_text())["seen"]["prompts"] == 2
    table = out.with_suffix(".md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert any(f"| {name} |" in table for name in ATTRIBUTES)
    drawn_files = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert drawn_files == ["held-out-000.png", "seen-000.png"]


def test_the_script_says_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(monkeypatch, "--model", folder, "--scorer", tmp_path)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: no scorer in {tmp_path}")
