"""A folder measured: figures of the right pictures, in any order, and a reason for what is missing."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from broken_pictures import scene
from PIL import Image, ImageOps
from scipy.ndimage import correlate1d
from tiny_clip import make_clip

import ldm
from ldm.errors import UserError
from ldm.evaluate.distances import frechet_distance, mmd, precision_recall
from ldm.evaluate.evaluate import PAIRS, VAE, Tools, compare, evaluate
from ldm.evaluate.features import ImageTower, unit
from ldm.evaluate.figures import Figure, Found, mean_figure, table, write_json
from ldm.evaluate.pictures import read_pictures
from ldm.evaluate.reconstruction import ssim
from ldm.images.png import save_png
from ldm.request import Request

CAPTIONS = ["the red boat", "a sea", "the boat"]


@contextmanager
def nobody(title):
    yield lambda done, total: None


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "whole"
    make_clip(folder)
    return ImageTower.load(folder)


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


def make_set(folder, seeds, captions=(), size=(40, 32)):
    folder.mkdir()
    for k, seed in enumerate(seeds):
        scene(seed, size).save(folder / f"{k:03}.png")
    for k, caption in enumerate(captions):
        (folder / f"{k:03}.txt").write_text(caption)
    return folder


def figures(found):
    return {figure.name: figure for figure in found.figures}


def test_two_sets_are_compared_by_their_features(tmp_path, clip):
    a = read_pictures(make_set(tmp_path / "a", range(12)))
    b = read_pictures(make_set(tmp_path / "b", range(100, 115)))
    found = evaluate(a, b, Tools(extractor=clip, seed=3), nobody)
    x, y = (clip.features([Image.open(path) for path in each.paths]) for each in (a, b))
    got = figures(found)
    assert got["FID"].value == pytest.approx(frechet_distance(x, y), rel=1e-4)
    assert got["CMMD x 1000"].value == pytest.approx(1000 * mmd(unit(x), unit(y)), rel=1e-4)
    precision, recall = precision_recall(x, y)
    assert (got["precision"].value, got["recall"].value) == (precision.share, recall.share)
    assert got["FID"].counts == {"measured": 12, "reference": 15}
    assert "one standard deviation over 100 subsets of 6" in got["KID"].spread
    assert set(found.left_out) == {*PAIRS, *VAE}
    assert found.protocol["pictures"]["sizes"] == {"40x32": 12}
    assert found.protocol["features"]["sha256"] == clip.digest
    assert found.protocol["seed"] == 3


def test_few_pictures_are_told_to_be_few():
    rng = np.random.default_rng(0)
    few, many = (compare(*rng.standard_normal((2, n, 8))) for n in (8, 9))
    assert "8 pictures for 8 dimensions" in figures(few)["FID"].notes[0]
    assert figures(many)["FID"].notes == ()
    lone = compare(*rng.standard_normal((2, 3, 8)))
    assert set(lone.left_out) == {"precision", "recall"}


def test_the_order_of_files_and_what_they_are_called_in_batches_change_nothing(tmp_path, clip):
    seeds = list(range(20))
    first = read_pictures(make_set(tmp_path / "a", seeds))
    again = read_pictures(make_set(tmp_path / "again", seeds))
    (tmp_path / "turned").mkdir()
    for k, seed in reversed(list(enumerate(seeds))):  # the disk's order is another one
        scene(seed, (40, 32)).save(tmp_path / "turned" / f"{k:03}.png")
    turned = read_pictures(tmp_path / "turned")
    b = read_pictures(make_set(tmp_path / "b", range(50, 70)))
    values = [
        [figure.value for figure in evaluate(each, b, Tools(extractor=clip), nobody).figures]
        for each in (first, again, turned)
    ]
    assert values[0] == values[1] == values[2]


# --- captions --------------------------------------------------------------------------------------------


def test_each_picture_is_scored_with_its_own_caption(tmp_path, clip):
    pictures = read_pictures(make_set(tmp_path / "a", range(3), CAPTIONS))
    found = evaluate(pictures, None, Tools(clip=clip), nobody)
    images = clip.embed([Image.open(path) for path in pictures.paths])
    cosines = images @ unit(clip.texts(CAPTIONS)).T
    want = {f"{k:03}.png": pytest.approx(100 * cosines[k, k], rel=1e-4) for k in range(3)}
    assert found.per_picture["CLIP score"] == want
    got = figures(found)
    assert got["CLIP score"].value == pytest.approx(100 * cosines.trace() / 3, rel=1e-4)
    right = int((cosines.argmax(axis=1) == np.arange(3)).sum())
    assert got["own caption is nearest"].value == right / 3
    assert got["CLIP score"].notes == ()


def test_a_caption_that_is_cut_is_said(tmp_path, clip):
    pictures = read_pictures(make_set(tmp_path / "a", range(2), ["boat " * 15, "a sea"]))
    (score, _) = evaluate(pictures, None, Tools(clip=clip), nobody).figures
    assert score.notes == ("1 of the captions are longer than this CLIP reads: cut",)


def test_features_of_one_tower_are_taken_once(tmp_path, clip):
    a, b = (
        read_pictures(make_set(tmp_path / name, seeds, CAPTIONS))
        for name, seeds in (("a", range(3)), ("b", range(9, 12)))
    )
    titles = []

    @contextmanager
    def watched(title):
        titles.append(title)
        yield lambda done, total: None

    evaluate(a, b, Tools(extractor=clip, clip=clip), watched)
    assert titles == ["features of a", "features of b"]


def test_a_picture_s_own_metadata_is_its_caption(tmp_path, clip):
    folder = make_set(tmp_path / "a", range(2))
    save_png(scene(5, (40, 32)), folder / "900.png", Request(prompt="a sea"))
    pictures = read_pictures(folder)
    assert pictures.captions == (None, None, "a sea")
    found = evaluate(pictures, None, Tools(clip=clip), nobody)
    assert list(found.per_picture["CLIP score"]) == ["900.png"]
    assert found.protocol["without_caption"] == 2
    assert found.left_out["own caption is nearest"] == "all pictures have the same caption"


def test_no_captions_are_a_reason(tmp_path, clip):
    found = evaluate(read_pictures(make_set(tmp_path / "a", range(2))), None, Tools(clip=clip), nobody)
    assert "has a caption" in found.left_out["CLIP score"]
    assert found.left_out["FID"] == "needs --reference FOLDER"
    assert found.figures == ()


# --- the VAE ---------------------------------------------------------------------------------------------


def structural_similarity(a, b):
    """Wang et al. 2004, eq. 13, borders mirrored; of [H, W, 3] in 0..1."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def mean(x):
        return correlate1d(correlate1d(x, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    c1, c2 = 0.01**2, 0.03**2
    m, n = mean(a), mean(b)
    va, vb, cov = mean(a * a) - m * m, mean(b * b) - n * n, mean(a * b) - m * n
    return (((2 * m * n + c1) * (2 * cov + c2)) / ((m * m + n * n + c1) * (va + vb + c2))).mean()


def test_ssim_is_the_formula():
    rng = np.random.default_rng(0)
    a = np.stack([np.asarray(scene(k, (48, 40))) for k in range(2)])
    b = (a + rng.normal(0, 20, a.shape)).clip(0, 255).astype(np.uint8)
    want = [structural_similarity(x / 255, y / 255) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b) == pytest.approx(want, abs=1e-5)
    assert ssim(a, a) == pytest.approx([1, 1])


def test_the_vae_is_measured_on_the_reference(tmp_path, clip, pipe):
    a = read_pictures(make_set(tmp_path / "a", range(4)))
    b = read_pictures(make_set(tmp_path / "b", range(10, 13), size=(60, 45)))
    found = evaluate(a, b, Tools(extractor=clip, vae=pipe), nobody)
    height, width = pipe.resolve(Request()).size
    level, before, after = [], [], []
    for path in b.paths:
        image = ImageOps.fit(Image.open(path), (width, height), Image.Resampling.LANCZOS)
        x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        copy = (pipe.decode(pipe.encode(x).mean) * 255).round() / 255
        level.append(-10 * math.log10(float(((x - copy).double() ** 2).mean())))
        before.append(image)
        after.append(Image.fromarray((copy[0].permute(1, 2, 0) * 255).round().byte().numpy()))
    got = figures(found)
    assert list(found.per_picture[VAE[0]].values()) == pytest.approx(level, abs=1e-3)
    assert got[VAE[0]].value == pytest.approx(np.mean(level), abs=1e-3)
    distance = frechet_distance(clip.features(before), clip.features(after))
    assert got[VAE[2]].value == pytest.approx(distance, rel=1e-3)
    assert found.protocol["vae"]["resize"].endswith(f"{width}x{height}, the middle cut out")


def test_the_vae_is_not_measured_on_its_own_pictures(tmp_path, pipe):
    pictures = read_pictures(make_set(tmp_path / "a", range(2)))
    found = evaluate(pictures, None, Tools(vae=pipe, drawn=True), nobody)
    assert "pictures that it has made" in found.left_out[VAE[0]]
    alone = evaluate(read_pictures(make_set(tmp_path / "b", [1])), None, Tools(vae=pipe), nobody)
    assert VAE[0] in figures(alone)
    assert "2 pictures or more" in alone.left_out[VAE[2]]


# --- what is wrong ---------------------------------------------------------------------------------------


def test_what_cannot_be_read_or_is_a_copy_is_left_out_and_said(tmp_path):
    folder = make_set(tmp_path / "a", range(3))
    (folder / "broken.png").write_bytes(b"<html>")
    (folder / "copy.png").write_bytes((folder / "000.png").read_bytes())
    scene(9, mode="CMYK").save(folder / "zz.jpg")
    pictures = read_pictures(folder)
    assert pictures.names() == ["000.png", "001.png", "002.png", "zz.jpg"]
    said = pictures.protocol()
    assert said["count"] == 4
    assert [line.partition(": ")[0].rpartition("/")[2] for line in said["left_out"]] == [
        "copy.png",
        "broken.png",
    ]
    assert said["converted"] == {"CMYK": 1}
    assert said["sizes"] == {"40x32": 3, "96x72": 1}


def test_sets_that_cannot_be_compared(tmp_path, clip):
    a, one = make_set(tmp_path / "a", range(4)), make_set(tmp_path / "one", [9])
    copy, other = make_set(tmp_path / "copy", range(6)), make_set(tmp_path / "other", [0, 7, 8])
    tools = Tools(extractor=clip)
    for left, right, match in (
        (a, a, "is the folder that is measured"),
        (a, one, "holds 1 picture: distances between sets need 2"),
        (a, copy, "there is nothing to compare"),
    ):
        with pytest.raises(UserError, match=match) as error:
            evaluate(read_pictures(left), read_pictures(right), tools, nobody)
        assert "\n" not in str(error.value)
    found = evaluate(read_pictures(a), read_pictures(other), tools, nobody)
    assert "1 of the pictures lie in both folders" in figures(found)["FID"].notes


def test_no_nan_reaches_a_file(tmp_path):
    with pytest.raises(FloatingPointError, match="FID is NaN"):
        Figure("FID", math.nan, "lower", {})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "out.json", Found(protocol={"x": math.nan}))
    assert list(tmp_path.iterdir()) == []


def test_a_bootstrap_s_interval_is_that_of_the_mean():
    values = {str(k): float(x) for k, x in enumerate(np.random.default_rng(0).normal(5, 2, 400))}
    figure = mean_figure("x", values, "pictures", seed=0)
    half = 1.96 * np.std(list(values.values()), ddof=1) / 20
    assert figure.high - figure.value == pytest.approx(half, rel=0.1)
    assert figure.value - figure.low == pytest.approx(half, rel=0.1)


def test_table_and_json_tell_the_same(tmp_path):
    figure = Figure("FID", 1.5, "lower", {"measured": 3, "reference": 4}, notes=("biased",))
    found = Found((figure,), {"KID": "needs torchmetrics"}, {"CLIP score": {"a.png": 1.0}}, {"seed": 0})
    lines = list(table(found))
    assert lines[1].split() == ["FID", "1.5", "lower", "3", "measured,", "4", "reference"]
    assert lines[2:] == ["note: FID: biased", "left out: KID: needs torchmetrics"]
    write_json(tmp_path / "out.json", found)
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["figures"]["FID"]["value"] == 1.5
    assert read["left_out"] == found.left_out
    assert read["per_picture"] == found.per_picture
