"""The questions that are put to likelihoods, with judges whose answers are known."""

import types

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm import postcards as world
from ldm.diffusion.likelihood import Likelihood
from ldm.evaluate.outliers import robust_scores
from ldm.postcards.scoring import likelihood
from ldm.postcards.scoring.curves import BOTTOM, COLOURS, LEFT, RIGHT, TOP, draw_curves
from ldm.postcards.scoring.prompts import evaluation_prompts

LN2 = float(np.log(2))


def test_captions_are_compared_picture_by_picture():
    """Own captions win by 0.2 bits, others lose by 1; pictures differ by more than that."""
    prompts = evaluation_prompts(6)
    asked = []

    def judge(pipe, picture, texts, seed):
        asked.append(texts)
        own = prompts[seed].text
        bits = {own: seed - 0.2, "": float(seed), prompts[(seed + 1) % 6].text: seed + 1.0}
        shared = np.random.default_rng(seed).normal(0, 50, 4)
        return [Likelihood(tuple(-bits[text] * 10 * LN2 + shared), 7, 10) for text in texts]

    found = likelihood.captions(None, judge, 6)
    assert [texts[0] for texts in asked] == [prompt.text for prompt in prompts]
    assert all(texts[0] != texts[2] for texts in asked)
    assert found["none - own"] == pytest.approx((0.2, 0), abs=1e-9)
    assert found["other - none"] == pytest.approx((1.0, 0), abs=1e-9)
    assert found["own caption"][1] > 0.5
    assert found["own likelier than none"]["right"] == found["own likelier than another's"]["right"] == 6
    assert found["of own - none, nats"] == pytest.approx(0, abs=1e-9)
    assert found["evaluations"] == 7


def test_kinds_are_those_of_the_likeliest_prompt(monkeypatch):
    """The judge knows 13 kinds of 14; the scorer says house always."""
    kinds = {
        np.asarray(likelihood.render(s)).tobytes(): s.groups[0].kind for s in likelihood.single_things(14)
    }
    assert sorted(kinds.values()) == sorted(world.KINDS)

    def judge(pipe, picture, prompts, *, seed, levels, noises):
        kind = kinds[np.asarray(picture).tobytes()]
        said = "a house" if kind == "duck" else f"a {kind}"
        return [Likelihood((10.0 if prompt == said else 0.0,), levels, 10) for prompt in prompts]

    def errors(pipe, picture, prompts, *, seed, levels):
        kind = kinds[np.asarray(picture).tobytes()]
        return [0.0 if prompt == f"a {kind}" else 1.0 for prompt in prompts]

    monkeypatch.setattr(likelihood, "denoising_bounds", judge)
    monkeypatch.setattr(likelihood, "content_errors", errors)
    presence = np.zeros((14, 14), np.float32)
    presence[:, world.KINDS.index("house")] = 1
    scorer = types.SimpleNamespace(read=lambda images: types.SimpleNamespace(presence=presence))
    found = likelihood.kinds(None, scorer, 14)
    assert [found[name]["right"] for name in ("8 levels", "4 levels of content", "the scorer")] == [13, 14, 1]
    assert found["wrong: is, said"]["8 levels"] == [("duck", "house")]
    assert found["wrong: is, said"]["4 levels of content"] == []


def test_strangers_are_ranked_among_renders():
    """By colour, of which grey has none; and by a measure that knows nothing."""

    def colour(pipe, picture, seed):
        return float(np.asarray(picture.convert("HSV"), np.float64)[..., 1].mean())

    found = likelihood.outliers(None, 5, {"colour": colour, "nothing": lambda *args: 1.0})
    told = found["colour"]["strangers: rank, score"]
    assert set(told) == set(likelihood.strangers())
    values = [
        colour(None, likelihood.render(prompt.scene), 0) for prompt in evaluation_prompts(5, held_out=True)
    ]
    values += [colour(None, picture, 0) for picture in likelihood.strangers().values()]
    scores = np.abs(robust_scores(values))
    assert [score for _, score in told.values()] == pytest.approx(scores[5:].tolist())
    assert [rank for rank, _ in told.values()] == [1 + int((scores > score).sum()) for score in scores[5:]]
    assert found["colour"]["renders' largest score"] == pytest.approx(scores[:5].max())
    assert {score for _, score in found["nothing"]["strangers: rank, score"].values()} == {0.0}
    assert found["nothing"]["renders that stand apart"] == 0


def test_the_bounds_figures_add_up(tiny_folder, tmp_path):
    pipe = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    found = likelihood.bounds(pipe, 2, steps=3, chart=tmp_path / "bound.webp")
    for name in ("own caption", "no caption"):
        terms = found[name]["terms, latents and pixels"]
        whole = sum(terms[term][1] for term in ("prior", "steps", "encoder", "pixels"))
        assert found[name]["pixels, bits/dim"][0] == pytest.approx(whole)
    means = [found[name]["latents, bits/dim"][0] for name in ("no caption", "own caption")]
    assert found["no caption - own"][0] == pytest.approx(means[0] - means[1], abs=1e-9)
    assert (tmp_path / "bound.webp").exists()


def test_curves_go_through_their_points(tmp_path):
    """From 1e-2 at the left to 1e-4 at the right, a straight line of a logarithmic axis."""
    t = [0, 250, 500, 1000]
    draw_curves(t, {"fall": [1e-2, 10**-2.5, 1e-3, 1e-4]}, tmp_path / "curve.webp")
    picture = np.asarray(Image.open(tmp_path / "curve.webp").convert("RGB"), np.int64)
    colour = np.array([int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    for share in (0.1, 0.5, 0.9):
        x, y = round(LEFT + share * (RIGHT - LEFT)), round(TOP + share * (BOTTOM - TOP))
        around = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
        assert np.abs(around - colour).sum(1).min() < 150
        assert np.abs(picture[y - 30, x] - colour).sum() > 200
