"""What rows become: cached or made anew the same tensors, mirrored, dropped, shuffled and masked as asked."""

import pytest
import torch
from tiny_finetune import write_pictures

import ldm
from ldm.dataset.buckets import Batches, Sample, Variation, make_buckets, make_crop
from ldm.dataset.cache import LatentCache, TextCache, open_and_crop
from ldm.dataset.examine import examine
from ldm.dataset.feed import Feed
from ldm.dataset.masks import masked_pictures
from ldm.models.kind import Kind
from ldm.prompts.text_encoder import Clip, TextEncoder
from ldm.train.loss_recipe import MaskSection

SIZE = (64, 64)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return examine(write_pictures(tmp_path_factory.mktemp("pictures") / "data", 6)).examples


@pytest.fixture
def make(families, tmp_path):
    """A factory: the feed of a family, with caches or without."""

    def make(family, cached=False, **options):
        parts = ldm.load(families(family)[0], dtype="fp32", device="cpu").parts
        pairs = ((parts.tokenizer, parts.text_encoder), (parts.tokenizer_2, parts.text_encoder_2))
        text = TextEncoder(tuple(Clip(*pair) for pair in pairs if pair[1] is not None))
        if cached:
            options |= {
                "latents": LatentCache(tmp_path / "latents", parts.vae),
                "texts": TextCache(tmp_path / "texts", text),
            }
        if parts.kind is Kind.INPAINT:
            options |= {"masks": MaskSection()}
        return Feed(parts.vae, text, frozenset(parts.unet.config.conditioning), **options)

    return make


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(examples, captions=None, **crop):
    captions = captions or [each.caption for each in examples]
    return [Sample(e, make_crop(e.size, SIZE, **crop), c) for e, c in zip(examples, captions, strict=True)]


def check_close(ours, expected):
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def told(feed, batch):
    conditioning = feed.conditioning(batch)
    return conditioning.tokens, conditioning.pooled


@pytest.mark.parametrize("family", ["sd1", "sdxl", "inpaint"])
def test_caches_and_none_give_the_same(make, examples, family):
    rows = rows_of(examples[:3], flipped=True)
    rows[1] = Sample(rows[1].example, rows[1].crop, "")
    plain, cached = (make(family, cached).tensors(rows, rng(5)) for cached in (False, True))
    again = make(family, True).tensors(rows, rng(5))  # read from the disk
    assert plain.keys() == cached.keys() == again.keys()
    for name in plain:
        check_close(cached[name], plain[name])
        assert torch.equal(again[name], cached[name])
    other = make(family, True).tensors(rows, rng(6))
    assert not torch.equal(other["x0"], cached["x0"])  # each showing draws its own latents
    assert torch.equal(other["tokens"], cached["tokens"])


def test_a_text_encoder_that_learns_reads_the_same(make, examples):
    captions = ["red boat", "", "the sea " * 20]  # of several windows
    rows = rows_of(examples[:3], captions)
    for family in ("sd1", "sdxl"):
        plain, learning = make(family), make(family, trains_text=True)
        batch = learning.tensors(rows, rng())
        assert "tokens" not in batch
        got, expected = told(learning, batch), told(plain, plain.tensors(rows, rng()))
        check_close(got[0], expected[0])
        if family == "sdxl":
            check_close(got[1], expected[1])


def test_a_mirrored_picture_has_its_own_latents(make, examples):
    feed = make("sd1", cached=True)
    plain, flipped = (feed.tensors(rows_of(examples[:2], flipped=f), rng())["x0"] for f in (False, True))
    assert float((plain - flipped).abs().max()) > 0.01
    pictures = torch.stack([open_and_crop(r.example, r.crop) for r in rows_of(examples[:2])]).flip(-1)
    moments = feed.vae.encode(pictures)
    expected = moments.mean + moments.std * torch.randn(plain.shape, generator=rng())
    check_close(flipped, expected.detach() * feed.vae.scaling_factor)


def test_both_sides_of_a_picture_are_shown(examples):
    batches = Batches(examples, [make_buckets(64)], 2, 0, Variation(random_flip=True))
    shown = [row for step in range(40) for row in batches.at(step)]
    assert {row.crop.flipped for row in shown if row.example == examples[0]} == {False, True}
    assert 0.3 < sum(row.crop.flipped for row in shown) / len(shown) < 0.7


@pytest.mark.parametrize("cached", [False, True])
def test_a_dropped_caption_is_the_empty_embedding(make, examples, cached):
    batches = Batches(examples, [[SIZE]], 3, 0, Variation(caption_dropout=1.0))
    feed = make("sd1", cached)
    batch = feed.tensors(batches.at(0), rng())
    tokens, _ = told(feed, batch)
    check_close(tokens, feed.text.encode([""] * 3).tokens)
    assert "kept" not in batch


@pytest.mark.parametrize("options", [{}, {"cached": True}, {"trains_text": True}])
def test_an_empty_caption_is_zeros_where_sdxl_is_drawn_with_zeros(make, examples, options):
    rows = rows_of(examples[:3], ["red boat", "", "the sea"])
    feed = make("sdxl", zeros_for_empty=True, **options)
    plain = make("sdxl").text.encode(["red boat", "", "the sea"])
    for value, expected in zip(
        told(feed, feed.tensors(rows, rng())), (plain.tokens, plain.pooled), strict=True
    ):
        assert not value[1].any()
        check_close(value[::2], expected[::2])
        assert expected[1].any()


def test_shuffled_tags_are_read_anew(make, examples):
    """`finetune` gives no cache of texts then, so that each order is what the encoder reads."""
    batches = Batches(examples, [[SIZE]], 1, 0, Variation(shuffle_tags=True, keep_tags=1))
    feed, captions = make("sd1"), set()
    for step in range(30):
        (row,) = batches.at(step)
        tags = row.example.caption.split(", ")
        assert row.caption.split(", ")[0] == tags[0]
        assert sorted(row.caption.split(", ")) == sorted(tags)
        captions.add(row.caption)
        tokens = feed.tensors([row], rng())["tokens"]
        assert torch.equal(tokens, feed.text.encode([row.caption]).tokens)
    assert len(captions) > len(examples)


def test_sizes_are_those_of_the_crop(make, examples):
    batches = Batches(examples, [make_buckets(64)], 2, 0, Variation(random_crop=True, random_flip=True))
    feed = make("sdxl")
    for step in range(6):
        rows = batches.at(step)
        batch = feed.tensors(rows, rng())
        assert batch["time_ids"].dtype == torch.float32
        for row, ids in zip(rows, batch["time_ids"].tolist(), strict=True):
            crop = row.crop
            assert ids == [*row.example.size, crop.top, crop.left, *crop.size]
    assert "time_ids" not in make("sd1").tensors(rows, rng())


def test_only_what_the_unet_takes_is_in_the_batch(make, examples):
    rows = rows_of(examples[:2])
    assert make("sd1").tensors(rows, rng()).keys() == {"x0", "tokens"}
    assert make("sd2_v").tensors(rows, rng()).keys() == {"x0", "tokens"}
    assert make("sdxl").tensors(rows, rng()).keys() == {"x0", "tokens", "pooled", "time_ids"}
    assert make("inpaint").tensors(rows, rng()).keys() == {"x0", "tokens", "mask", "masked"}


@pytest.mark.parametrize("cached", [False, True])
def test_masked_latents_are_of_the_picture_without_what_is_masked(make, examples, cached):
    feed, rows = make("inpaint", cached), rows_of(examples)
    batch = feed.tensors(rows, rng(2))
    mask = batch["mask"]
    assert mask.shape == (6, 1, *SIZE)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    pictures = torch.stack([open_and_crop(row.example, row.crop) for row in rows])
    with torch.no_grad():
        moments = feed.vae.encode(masked_pictures(pictures, mask))
    apart = (batch["masked"] / feed.vae.scaling_factor - moments.mean) / moments.std  # unit noise
    assert float(apart.abs().max()) < 6
    assert 0.9 < float(apart.std()) < 1.1
