"""The watermark: what it survives, what it costs, and that chance shows no more of it than the bound says."""

import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn
from scipy.special import ndtr

from ldm import postcards
from ldm.errors import UserError
from ldm.images import watermark
from ldm.images.watermark import BOUND, FALSE_POSITIVES, THRESHOLD, Detection, detect, key_named, mark, scores
from ldm.request import Request
from ldm.request.fields import KEY_VARIABLE, mark_named

KEY = b"ldm"


def jpeg(image, quality=75):
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def half(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def as_marked(pixels, key=KEY):
    return Image.fromarray((mark(pixels / 255, key) * 255).round().astype(np.uint8))


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


@pytest.fixture(scope="module")
def pictures():
    """[40, 128, 128, 3] of 8 bits."""
    scenes = (postcards.sample_scene(random.Random(f"a test's {k}")) for k in range(40))
    return [np.asarray(postcards.render(scene, 128))[..., :3] for scene in scenes]


@pytest.fixture(scope="module")
def marked(pictures):
    return [as_marked(pixels) for pixels in pictures]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        jpeg,
        half,
        lambda image: half(jpeg(image)),
        lambda image: image.resize((200, 150)),
        lambda image: image.resize((64, 64), Image.Resampling.BILINEAR),
        lambda image: image.convert("L").convert("RGB"),
    ],
    ids=["none", "JPEG 75", "half", "JPEG 75 and half", "another shape", "bilinear", "grey"],
)
def test_it_is_found_after_what_happens_to_pictures(marked, change):
    z = [detect(np.asarray(change(image)), KEY).z for image in marked]
    assert min(z) > THRESHOLD


def test_its_price(pictures, marked):
    prices = [psnr(a, b) for a, b in zip(pictures, marked, strict=True)]
    assert np.mean(prices) > 41
    assert min(prices) > 35
    change = np.asarray(marked[0], int) - pictures[0]
    inside = (pictures[0] > 20).all(2) & (pictures[0] < 235).all(2)  # where nothing is clipped
    assert np.ptp(change, axis=2)[inside].max() == 0  # colours stay


def test_another_key_finds_nothing(marked):
    z = [detect(np.asarray(image), f"key {k}".encode()).z for image in marked for k in range(20)]
    assert max(z) < THRESHOLD
    assert np.mean(z) < 1.03  # the mean of the highest of four normal variables


def test_unmarked_pictures_show_no_more_than_the_bound(pictures):
    """Over 40 pictures and 2,000 keys each, with room for five standard deviations of the counts."""
    rng, found = np.random.default_rng(0), []
    for k, pixels in enumerate(pictures):
        g = scores(pixels, k % 2).ravel()
        g = g[g != 0]
        found.append(rng.choice([-1.0, 1.0], (2000, g.size)) @ g / np.linalg.norm(g))
    z = np.concatenate(found)
    assert abs(z.std() - 1) < 0.02
    for t in (1.0, 2.0, 3.0, 3.5):
        expected = len(z) * ndtr(-t)
        hits = (z >= t).sum()
        assert hits <= min(1, BOUND * ndtr(-t)) * len(z)
        assert hits > expected - 5 * np.sqrt(expected)  # the statistic is what it says


def test_the_bound_holds_for_sums_that_can_be_counted_out():
    rng = np.random.default_rng(0)
    every = np.array(list(itertools.product((-1, 1), repeat=12)))
    for g in (np.ones(12), np.eye(1, 12)[0], rng.random(12), rng.standard_cauchy(12), [1, 1, *[0] * 10]):
        z = every @ g / np.linalg.norm(g)
        for t in np.unique(z):
            assert (z >= t - 1e-12).mean() <= BOUND * ndtr(-t) + 1e-12


def test_the_threshold_is_the_stated_rate():
    assert Detection(THRESHOLD).chance == pytest.approx(FALSE_POSITIVES)
    assert Detection(THRESHOLD).found
    assert not Detection(THRESHOLD - 1e-6).found
    assert Detection(-50.0).chance == 1
    assert pytest.approx(3.178, abs=1e-3) == BOUND


def test_keys_have_balanced_signs_of_their_own():
    a, b = (watermark._signs(f"key {k}".encode(), (480, 480)) for k in (0, 1))
    assert set(np.unique(a)) == {-1, 1}
    assert abs(a.mean()) < 0.01
    assert abs((a * b).mean()) < 0.01


@pytest.mark.parametrize(("size", "octave"), [(64, 0), (97, 0), (128, 0), (97, 1), (160, 1)])
def test_waves_are_those_of_a_dct(size, octave):
    picture = np.random.default_rng(0).random((size, size))
    waves = watermark._waves(size, octave)
    rows = min(size, watermark.HIGHEST << octave)
    wanted = dctn(picture, norm="ortho")[:rows, :rows]
    np.testing.assert_allclose(waves @ picture @ waves.T, wanted, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "octave", "price"), [(256, 1, 43), (384, 1, 44), (512, 2, 47), (1024, 3, 50)]
)
def test_larger_pictures_are_marked_more_finely(size, octave, price):
    assert watermark.octave_of(size, size + 8) == octave
    pixels = np.asarray(postcards.render(postcards.sample_scene(random.Random(f"large {size}")), size))[
        ..., :3
    ]
    image = as_marked(pixels)
    assert psnr(image, pixels) > price
    for changed in (image, jpeg(image), half(image), half(jpeg(image))):
        assert detect(np.asarray(changed), KEY).found
    assert not detect(np.asarray(image), b"another").found
    assert not detect(pixels, KEY).found


@pytest.mark.parametrize("value", [0, 255, 128])
def test_pictures_that_are_empty(value):
    flat = np.full((96, 64, 3), value, np.uint8)
    assert abs(detect(flat, KEY).z) < THRESHOLD
    image = np.asarray(as_marked(flat))
    assert image.shape == flat.shape
    assert detect(image, KEY).found


def test_any_size_can_be_asked():
    for shape in ((1, 1), (3, 200), (16, 16)):
        assert not detect(np.random.default_rng(0).integers(0, 256, (*shape, 3)), KEY).found
    with pytest.raises(UserError, match="it needs at least 64 a side"):
        mark(np.zeros((64, 56, 3)), KEY)


def test_keys_by_their_names(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert Request(watermark=True).watermark == "ldm"
    assert Request(watermark=False).watermark is None
    assert key_named("ldm") == b"ldm"
    monkeypatch.setenv(KEY_VARIABLE, "a secret")
    name = Request(watermark=True).watermark
    assert name == mark_named(b"a secret")
    assert "secret" not in name
    assert key_named(name) == b"a secret"
    assert Request.from_json(Request(watermark=True).to_json()).watermark == name
    monkeypatch.setenv(KEY_VARIABLE, "another")
    with pytest.raises(UserError, match="set LDM_WATERMARK_KEY"):
        key_named(name)
    with pytest.raises(UserError, match="watermark 'words' is not allowed: it must be true, ldm or key"):
        Request(watermark="words")
