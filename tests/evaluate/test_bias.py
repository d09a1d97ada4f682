"""Shares of what pictures of one prompt show: counted exactly, judged as transformers judges."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_clip
from tiny_pipeline import randomise
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from ldm.cli import main
from ldm.errors import UserError
from ldm.evaluate.bias import Judge, by_classifier, by_clip, probe, read_texts, shares, table
from ldm.evaluate.features import ImageTower

NAMES = ["cat", "dog", "owl"]


def pictures(folder, count=5, side=32):
    rng = np.random.default_rng(2)
    folder.mkdir()
    paths = [folder / f"{k}.png" for k in range(count)]
    for path in paths:
        low, high = sorted(rng.integers(0, 256, 2))
        Image.fromarray(rng.integers(low, high + 1, (side, side, 3), dtype=np.uint8)).save(path)
    return paths


def test_shares_are_counts_with_wilson_intervals():
    """The closed form of 30 of 50: (0.6 + z^2/100 +- z sqrt(0.24/50 + z^2/10000)) / (1 + z^2/50)."""
    told = {"hair": ["dark"] * 30 + ["fair"] * 20}
    found = list(shares("a person", told, {"hair": ["fair", "dark", "red"]}))
    assert [(each.label, each.rate.right, each.rate.n) for each in found] == [
        ("dark", 30, 50), ("fair", 20, 50), ("red", 0, 50)
    ]  # fmt: skip
    z = 1.959963984540054
    root, scale = z * (0.24 / 50 + z * z / 1e4) ** 0.5, 1 + z * z / 50
    low, high = ((0.6 + z * z / 100 + sign * root) / scale for sign in (-1, 1))
    assert (found[0].rate.low, found[0].rate.high) == pytest.approx((low, high), abs=1e-12)
    # Of none the upper bound is z^2 / (n + z^2): what was never seen may still be there.
    assert (found[2].rate.low, found[2].rate.high) == pytest.approx((0, z * z / (50 + z * z)), abs=1e-12)
    many = [str(k) for k in range(20)]
    assert [each.label for each in shares("x", {"a": ["7", "7", "3"]}, {"a": many})] == ["7", "3"]


def test_each_prompt_has_its_own_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.evaluate.bias.AT_ONCE", 2)
    paths = pictures(tmp_path / "p", 6)
    first = {np.asarray(Image.open(path))[0, 0, 0]: path.stem for path in paths}
    judge = Judge(
        {"name": []}, lambda images: {"name": [first[np.asarray(each)[0, 0, 0]] for each in images]}, {}
    )
    found = probe(judge, [("a", paths[:5]), ("b", paths[5:])])
    assert [(each.prompt, each.label) for each in found] == [*(("a", str(k)) for k in range(5)), ("b", "5")]
    lines = list(table(found))
    assert lines[0] == "'a', name (of 5, 95 % Wilson intervals)"
    assert lines[1].startswith("  0  0.200  [0.036, 0.624]")
    assert lines[6] == "'b', name (of 1, 95 % Wilson intervals)"


def test_a_classifiers_labels_are_its_highest_logits(tmp_path):
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=16, id2label=dict(enumerate(NAMES)), label2id={name: k for k, name in enumerate(NAMES)},
    )  # fmt: skip
    model = randomise(ViTForImageClassification(config), 3.0)
    model.save_pretrained(tmp_path / "c")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "c")
    paths = pictures(tmp_path / "p", 8)
    images = [Image.open(path) for path in paths]
    with torch.no_grad():
        logits = model(**processor(images=images, return_tensors="pt")).logits
    judge = by_classifier(tmp_path / "c")
    assert judge.labels == {"class": NAMES}
    expected = [NAMES[k] for k in logits.argmax(1)]
    assert judge.read(images)["class"] == expected
    assert len({*expected}) > 1
    with pytest.raises(UserError, match="cannot read the classifier"):
        by_classifier(tmp_path / "p")


def test_clip_chooses_the_nearest_text(tmp_path):
    make_clip(tmp_path / "clip")
    texts = {"thing": ["the red boat", "a sea"], "other": ["red", "the sea", "boat"]}
    images = [Image.open(path) for path in pictures(tmp_path / "p", 8)]
    tower = ImageTower.load(tmp_path / "clip")
    told = by_clip(tower, texts).read(images)
    clip = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    pixels = torch.as_tensor(np.stack(tower.processor(images=images)["pixel_values"]))
    for name, own in texts.items():
        tokens = tokenizer(own, padding="max_length", max_length=16, return_tensors="pt")
        with torch.no_grad():
            logits = clip(**tokens, pixel_values=pixels).logits_per_image
        assert told[name] == [own[k] for k in logits.argmax(1)]


def test_texts_are_read_line_by_line(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("# who\nhair: dark hair | fair hair\n\nage: a child | an adult | an old person\n")
    assert read_texts(path) == {
        "hair": ["dark hair", "fair hair"], "age": ["a child", "an adult", "an old person"]
    }  # fmt: skip
    for wrong, said in (
        ("hair\n", "line 1: 'hair' is no attribute"),
        ("a: b\n", "line 1"),
        ("", "no texts in"),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=said):
            read_texts(path)


def test_the_scorer_tells_the_colours_of_renders():
    from ldm import postcards as world
    from ldm.postcards.scoring.captioned import world_judge
    from ldm.postcards.scoring.prompts import evaluation_prompts

    some = [each for each in evaluation_prompts(120) if len(each.objects) == 1 and each.objects[0].count == 1]
    some = [each for each in some if each.objects[0].colour is not None][:24]
    told = world_judge().read([Image.fromarray(world.render(each.scene, 128)) for each in some])
    for name, attribute in (("kind", "kind"), ("colour", "colour")):
        right = [
            label == getattr(each.objects[0], attribute) for label, each in zip(told[name], some, strict=True)
        ]
        assert np.mean(right) > 0.9


def test_the_command_draws_each_prompt_with_the_same_seeds_and_writes_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a house\na red house\n")
    assert main(["evaluate", "--bias", "p.txt", "-n", "3", "--steps", "2", "-s", "5", "--out", "o"]) == 0
    told = json.loads((tmp_path / "o" / "bias.json").read_text())
    assert len(list((tmp_path / "o" / "drawn").iterdir())) == 6
    attributes = {"kind", "colour", "place", "time", "weather"}
    for prompt in ("a house", "a red house"):
        own = [each for each in told["shares"] if each["prompt"] == prompt]
        assert {each["attribute"] for each in own} == attributes
        for name in attributes:
            assert sum(each["rate"]["right"] for each in own if each["attribute"] == name) == 3
    assert "'a red house', colour (of 3, 95 % Wilson intervals)" in capsys.readouterr().out
    from ldm.images.png import read_request

    requests = [read_request(path) for path in sorted((tmp_path / "o" / "drawn").iterdir())]
    assert [each.seeds[0] for each in requests] == [5, 6, 7, 5, 6, 7]
    assert [each.prompt for each in requests] == ["a house"] * 3 + ["a red house"] * 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bias", "p.txt", "--prompts", "p.txt"], "or --bias"),
        (["--bias", "p.txt", "--clip", "c"], "--bias-texts needs --clip"),
        (["--bias", "p.txt", "--bias-texts", "t"], "--bias-texts needs --clip"),
        (["--bias", "p.txt", "--reference", "r"], "measures against nothing"),
        (["--prompts", "p.txt", "--bias-classifier", "c"], "are for --bias"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *flags]) == 2
    assert said in capsys.readouterr().err
