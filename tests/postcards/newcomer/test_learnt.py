"""Windmills in the world that does not know them, and the probe that finds them."""

import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import make_folder

pytest.importorskip("skia")

import ldm
from ldm import postcards as world
from ldm.postcards import phrases, things, vocabulary
from ldm.postcards.newcomer.learnt import (
    Probe,
    examples,
    fit_probe,
    newcomer_prompts,
    score,
    scorer_features,
    windmill_probe,
)
from ldm.postcards.newcomer.windmill import PARTICULAR, Livery, sample_postcard, shows_stamp
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import Settings

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "render_windmills.py"


@pytest.fixture(scope="module")
def scorer():
    return Scorer.load(ROOT / "weights" / "postcard-eval")


def postcards(n, livery=None):
    return [sample_postcard(random.Random(f"test {k}"), livery) for k in range(n)]


def run(monkeypatch, script, *args):
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
    runpy.run_path(str(script), run_name="__main__")


def test_the_embedded_models_world_is_as_it_was():
    tables = vocabulary.SHAPES, things.DRAW, phrases.NOUNS
    before = [dict(table) for table in tables]
    words, scene = world.words(), world.sample_scene(random.Random(0))
    pixels = world.render(scene)
    for postcard in postcards(3):
        postcard.render()
        postcard.caption(random.Random(0))
    assert [dict(table) for table in tables] == before
    assert world.words() == words
    np.testing.assert_array_equal(world.render(scene), pixels)


def test_only_the_windmill_and_its_shadow_are_added():
    """Outside of the box, the picture is the world's own picture of the bare scene."""
    for postcard in postcards(12):
        scene, (box,) = postcard.scene, postcard.scene.groups[0].boxes
        if scene.weather == "clear":
            continue  # the sun keeps away from things
        changed = (postcard.render() != world.render(replace(scene, groups=()))).any(axis=2)
        rows, columns = np.nonzero(changed)
        assert box.left - 0.01 <= columns.min() / 128 < columns.max() / 128 <= box.right + 0.01
        assert box.top - 0.02 <= rows.min() / 128 < rows.max() / 128 <= box.bottom + 0.02
        mask = postcard.mask()
        assert 0.04 < mask.mean() < 0.25
        assert (changed | ~mask)[: int(126 * box.bottom)].mean() > 0.99


def test_captions_say_what_was_drawn():
    for postcard in postcards(30):
        scene, rng = postcard.scene, random.Random(1)
        assert "windmill" in postcard.caption(rng).lower()
        full = postcard.full_caption()
        assert f"{postcard.livery.tower} windmill" in full
        assert phrases.TIMES[scene.time][0] in full
        assert phrases.WEATHERS[scene.weather][0] in full
    (only,) = postcards(1, PARTICULAR)
    assert only.caption(random.Random(0), "<mill>") == only.full_caption("<mill>")
    assert only.full_caption("<mill>").startswith("a <mill> ")


def test_the_particular_windmill_is_always_in_its_colours():
    """By day colours are seen as they are painted: a white tower with red bands, and blue sails."""
    for postcard in postcards(8, PARTICULAR):
        noon = replace(postcard, scene=replace(postcard.scene, time="day", weather="cloudy"))
        pixels = noon.render()[noon.mask()].astype(int)
        for colour, share in (("red", 0.05), ("white", 0.05), ("blue", 0.1)):
            near = np.abs(pixels - np.array(things.PAINT[colour])).max(axis=1) < 12
            assert near.mean() > share, colour


def test_rendered_folders_depend_on_the_seed_alone(monkeypatch, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(monkeypatch, SCRIPT, tmp_path / name, "--count", 3, "--seed", seed)
    a, b, c = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b", "c")
    )
    assert sorted(a) == ["000.png", "000.txt", "001.png", "001.txt", "002.png", "002.txt"]
    assert a == b
    assert all(a[name] != c[name] for name in a if name.endswith("png"))
    assert Image.open(tmp_path / "a" / "000.png").size == (128, 128)
    with pytest.raises(SystemExit):
        run(monkeypatch, SCRIPT, tmp_path / "a")
    assert "is not empty" in capsys.readouterr().err


def test_stamps_are_where_the_masks_are_black_and_are_found(monkeypatch, tmp_path):
    for name, flags in (("stamped", ["--stamped"]), ("plain", [])):
        run(monkeypatch, SCRIPT, tmp_path / name, "--count", 4, *flags)
    stamped, plain, masks = (
        np.stack([np.asarray(Image.open(tmp_path / folder / f"{k:03d}{end}.png")) for k in range(4)])
        for folder, end in (("stamped", ""), ("plain", ""), ("stamped", ".mask"))
    )
    assert ((stamped != plain).any(-1) == ~masks.astype(bool)).all()
    assert shows_stamp(stamped).all()
    assert not shows_stamp(plain).any()
    assert len(list((tmp_path / "plain").iterdir())) == 8


def test_the_probe_tells_windmills_it_was_not_fitted_on(scorer):
    probe = windmill_probe(scorer, count=40)
    shown, others = examples("held out", 20)
    assert probe.share(shown).share > 0.9
    assert probe.share(others).share < 0.1


def test_the_particular_windmill_is_told_from_others(scorer):
    probe = windmill_probe(scorer, particular=True, count=60)
    ours, greens = (
        np.stack([postcard.render() for postcard in postcards(12, livery)])
        for livery in (PARTICULAR, Livery("green"))
    )
    assert probe.share(ours).share > 0.6
    assert probe.share(greens).share < 0.1


def test_probes_are_the_same_every_time(scorer):
    sets = examples("twice", 8, particular=True), examples("twice", 8, particular=True)
    for one, two in zip(*sets, strict=True):
        np.testing.assert_array_equal(one, two)
    one, two = (fit_probe(scorer, *each) for each in sets)
    np.testing.assert_array_equal(one.weights, two.weights)


def test_a_probe_is_at_the_least_of_its_loss(scorer):
    """Where the gradient of the loss, written as plain sums, is zero."""
    shown, others = examples("optimum", 12)
    probe = fit_probe(scorer, shown, others, l2=0.1)
    x = scorer_features(scorer, np.concatenate([shown, others]))
    y = np.repeat([1, -1], [len(shown), len(others)])
    pull = y / (1 + np.exp(y * (x @ probe.weights + probe.bias))) / len(y)
    scale = x.std(axis=0) + 1e-6
    slope = (pull @ (x - x.mean(axis=0))) / scale - 0.1 * probe.weights * scale
    np.testing.assert_allclose(slope, 0, atol=1e-4)
    assert abs(pull.sum()) < 1e-4


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_score_draws_each_group_and_asks_each_probe(tmp_path, scorer):
    make_folder(tmp_path / "tiny")
    pipe = ldm.load(tmp_path / "tiny", device="cpu", dtype="fp32")
    nothing = np.zeros(scorer_features(scorer, np.zeros((1, 128, 128, 3), np.uint8)).shape[1])
    probes = {"always": Probe(scorer, nothing, 1.0), "never": Probe(scorer, nothing, -1.0)}
    groups = {"asked for": newcomer_prompts(3, "<mill>"), "ordinary": evaluation_prompts(2)}
    told: list[int] = []
    table, pictures = score(pipe, probes, groups, Settings(steps=2, batch_size=2), told.append)
    assert told == [2, 3, 5]
    assert {name: len(images) for name, images in pictures.items()} == {"asked for": 3, "ordinary": 2}
    assert (table["asked for"]["always"].right, table["asked for"]["never"].right) == (3, 0)
    assert all(table["asked for"][what].n == 3 for what in ("place", "time of day", "weather"))
    assert "one object: right kind" not in table["asked for"]


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_the_script_prints_the_table_and_writes_it(tmp_path, tiny_folder, scorer, monkeypatch, capsys):
    count = scorer_features(scorer, np.zeros((1, 128, 128, 3), np.uint8)).shape[1]
    always = Probe(scorer, np.zeros(count), 1.0)
    monkeypatch.setattr("ldm.postcards.newcomer.learnt.windmill_probe", lambda *_, **__: always)
    asked = ["--n", 2, "--ordinary", 0, "--steps", 1, "--particular", "--out", tmp_path / "a.json"]
    weights = ["--scorer", ROOT / "weights" / "postcard-eval", "--device", "cpu", "--dtype", "fp32"]
    run(monkeypatch, SCRIPT.with_name("score_newcomer.py"), tiny_folder, *asked, *weights)
    out = capsys.readouterr().out
    assert "shows a windmill" in out
    assert "shows the particular windmill" in out
    assert "1.000" in out
    assert "shows a windmill" in (tmp_path / "a.json").read_text(encoding="utf-8")
