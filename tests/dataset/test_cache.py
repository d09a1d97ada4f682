"""The cache of latents and texts: equal to a fresh encoding, whatever was damaged, shared or killed."""

import hashlib
import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import forked
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint.io import read_metadata
from ldm.dataset import cache
from ldm.dataset.buckets import Batches, Variation, make_buckets
from ldm.dataset.cache import LatentCache, TextCache, module_digest, open_and_crop
from ldm.dataset.findings import Example
from ldm.errors import UserError
from ldm.pipeline.networks import encode
from ldm.prompts.text_encoder import TextEncoder

SIZES = [(40, 30), (30, 40), (32, 32), (50, 50), (33, 32), (64, 61), (70, 90)]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for i, (h, w) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        made.append(Example(path, f"red boat {i}", (h, w), digest))
    return made


@pytest.fixture(scope="module")
def shown(examples):
    batches = Batches(examples, [make_buckets(32, unit=8)], 2, 0, Variation(random_flip=True))
    return list(batches.crops())


def of_one_size(shown):
    return [each for each in shown if each[1].size == (32, 32)]


def load(folder, dtype="fp32"):
    return ldm.load(folder, device="cpu", dtype=dtype)


def vae_of(folder, dtype="fp32"):
    return load(folder, dtype).parts.vae


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder):
    """By path: what a file holds. (safetensors writes metadata in any order, so bytes differ.)"""
    return {path.relative_to(folder): content(path) for path in files(folder)}


def content(path):
    try:
        return read_metadata(path), {
            name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()
        }
    except (UserError, SafetensorError):
        return path.read_bytes()


# --- latents ---------------------------------------------------------------------------------------------


def fresh(vae, shown):
    """Encoded anew, as many at once as the cache does."""
    images = [open_and_crop(*each) / 2 + 0.5 for each in shown]
    at_once = cache.PIXELS_AT_ONCE // 32**2
    encoded = encode(vae, torch.stack(images + [images[-1]] * (at_once - len(images))))
    return encoded.mean[: len(shown)], encoded.std[: len(shown)]


@pytest.mark.parametrize("vae", ["kl", "tiny"])
def test_cached_latents_equal_fresh_ones(vae, tiny_folder, shown, tmp_path):
    if vae == "tiny":
        from tiny_pipeline import make_folder

        tiny_folder = tmp_path / "tiny"
        make_folder(tiny_folder, vae="tiny")
    network, some = vae_of(tiny_folder), of_one_size(shown)
    mean, std = fresh(network, some)
    told = []
    latents = LatentCache(tmp_path / "cache", network)
    assert latents.fill(shown, told.append) == sum(told) == len(shown)
    assert latents.fill(shown, told.append) == 0
    read = LatentCache(tmp_path / "cache", network).read(some)
    assert torch.equal(read.mean, mean)
    assert torch.equal(read.std, std)
    assert bool(std.any()) == (vae == "kl")
    assert not torch.equal(read.mean[0], read.mean[1]), "the mirrored picture is another"
    assert torch.equal(LatentCache(tmp_path / "other", network).read(some[1:2]).mean, mean[1:2]), (
        "not filled before"
    )


def test_latents_equal_those_of_diffusers(families, shown, tmp_path):
    folder, pipe = families("sdxl")
    some = of_one_size(shown)
    images = torch.stack([open_and_crop(*each) for each in some])
    with torch.no_grad():
        theirs = pipe.vae.encode(images).latent_dist
    ours = LatentCache(tmp_path, vae_of(folder)).read(some)
    scale = pipe.vae.config.scaling_factor
    torch.testing.assert_close(ours.mean, theirs.mean * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.std, theirs.std * scale, rtol=1e-4, atol=1e-5)


def test_bf16_is_kept_in_half_the_space_and_rounded_once(tiny_folder, shown, tmp_path):
    half, whole = (
        LatentCache(tmp_path / "a", vae_of(tiny_folder, "bf16")),
        LatentCache(tmp_path / "b", vae_of(tiny_folder)),
    )
    some = of_one_size(shown)
    mean, _ = fresh(half.vae, some)
    read = half.read(some).mean
    assert torch.equal(read, mean.bfloat16().float())
    assert (read - whole.read(some).mean).abs().max() < 0.05 * read.abs().max()
    values = [sum(t.nbytes for t in load_file(files(tmp_path / name)[0]).values()) for name in "ab"]
    assert values[0] * 2 == values[1]


def test_each_thing_that_matters_makes_another_entry(tiny_folder, shown, tmp_path):
    def entries(network, examples):
        LatentCache(tmp_path, network).read(examples)
        return len(files(tmp_path))

    one, vae = shown[:1], vae_of(tiny_folder)
    assert entries(vae, one) == 1
    assert entries(vae_of(tiny_folder), one) == 1, "loaded again, it is the same"
    assert entries(vae, [(replace(one[0][0], digest="0" * 64), one[0][1])]) == 2, "the picture's bytes"
    assert entries(vae, [(one[0][0], replace(one[0][1], left=one[0][1].left + 1))]) == 3, "the crop"
    assert entries(vae, [shown[1]]) == 4, "mirrored"
    assert entries(vae_of(tiny_folder, "bf16"), one) == 5, "the dtype"
    vae.scaling_factor, vae.config = 1.0, vae.config.__class__(**vars(vae.config) | {"scaling_factor": 1.0})
    assert entries(vae, one) == 6, "the config"
    vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    assert entries(vae, one) == 7, "a single weight"
    entry = {path: json.loads(read_metadata(path)["of"]) for path in files(tmp_path)}
    assert {told["picture"] for told in entry.values()} == {"0" * 64, one[0][0].digest}, (
        "an entry says of what"
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def flip_one_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def rewrite(change):
    """A whole, valid file, checksum and all, with other tensors."""

    def damage(path):
        entry = {name: change(tensor) for name, tensor in load_file(path).items()}
        told = read_metadata(path) | {"sha256": cache._checksum(entry)}
        save_file(entry, path, told)

    return damage


def exchange(path):
    other = next(each for each in files(path.parent.parent) if each != path)
    path.write_bytes(other.read_bytes())


def no_metadata(path):
    save_file(load_file(path), path)


DAMAGES = {
    "truncated": truncate,
    "header cut": cut_header,
    "empty": empty,
    "missing": lambda path: path.unlink(),
    "a bit flipped": flip_one_bit,
    "wrong shape": rewrite(lambda tensor: tensor[:-1].contiguous()),
    "wrong dtype": rewrite(torch.Tensor.double),
    "NaN": rewrite(lambda tensor: tensor * float("nan")),
    "Inf": rewrite(lambda tensor: tensor / 0),
    "another's": exchange,
    "without metadata": no_metadata,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(damage, tiny_folder, shown, tmp_path):
    pipe, some = load(tiny_folder), of_one_size(shown)
    latents, texts = LatentCache(tmp_path / "cache", pipe.parts.vae), TextCache(tmp_path / "text", pipe.text)
    latents.fill(some)
    texts.fill(["red boat", "the sea"])
    before, read, told = contents(tmp_path), latents.read(some), texts.read(["red boat"])
    victims = latents.store.path(latents._of(*some[2])), texts.store.path(texts._of("red boat"))
    for victim in victims:
        DAMAGES[damage](victim)
    assert contents(tmp_path) != before
    assert torch.equal(latents.read(some).mean, read.mean), "read alone, the same to the bit"
    assert torch.equal(texts.read(["red boat"]).tokens, told.tokens)
    assert contents(tmp_path) == before
    for victim in victims:
        DAMAGES[damage](victim)
    assert (latents.fill(some), texts.fill(["the sea", "red boat"])) == (1, 1), "that one and no other"
    assert contents(tmp_path) == before


def test_a_picture_that_cannot_be_read_is_named(tiny_folder, shown, tmp_path):
    latents = LatentCache(tmp_path / "cache", vae_of(tiny_folder))
    example, crop = shown[0]
    gone = replace(example, path=tmp_path / "gone.png", digest="0" * 64)
    other = replace(gone, path=shown[-1][0].path)
    for fault in (gone, other):
        with pytest.raises(UserError, match=fault.path.name):
            latents.fill([(fault, crop)])
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_told(tiny_folder, shown, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the cache .*file"):
        LatentCache(tmp_path / "file", vae_of(tiny_folder)).fill(shown[:1])


def test_a_full_disk_leaves_what_was_there(tiny_folder, shown, tmp_path, monkeypatch):
    latents = LatentCache(tmp_path, vae_of(tiny_folder))
    latents.fill(shown[:2])
    before = contents(tmp_path)

    def full(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_tensors", full)
    with pytest.raises(UserError, match="No space left on device"):
        latents.fill(shown)
    assert contents(tmp_path) == before


# --- several processes -----------------------------------------------------------------------------------


def fill(folder, vae, shown, start):
    torch.set_num_threads(1)
    latents = LatentCache(folder, vae)
    start.wait()
    latents.fill(shown)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_two_processes_share_a_cache_and_a_killed_one_leaves_nothing_half(tiny_folder, shown, tmp_path):
    alone, shared, vae = tmp_path / "alone", tmp_path / "shared", vae_of(tiny_folder)
    torch.set_num_threads(1)
    LatentCache(alone, vae).fill(shown)

    context = forked()
    start = context.Barrier(3)
    running = [context.Process(target=fill, args=(shared, vae, shown, start)) for _ in range(3)]
    for process in running:
        process.start()
    while not files(shared):
        assert any(process.is_alive() for process in running)
        time.sleep(0.001)
    os.kill(running[0].pid, signal.SIGKILL)  # the others go on, at the same entries
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] in ([-9, 0, 0], [0, 0, 0])
    whole = {path: held for path, held in contents(shared).items() if path.suffix == ".safetensors"}
    assert whole == contents(alone)

    leftover = shared / ".0123.tmp"
    leftover.write_bytes(b"half")
    LatentCache(shared, vae)
    assert leftover.exists(), "it may be in use"
    os.utime(leftover, (0, 0))
    LatentCache(shared, vae)
    assert not leftover.exists()


# --- texts -----------------------------------------------------------------------------------------------

LONG = "the red boat at sea " * 3


@pytest.mark.filterwarnings("ignore:a prompt is longer")
@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner"])
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_cached_texts_equal_fresh_ones(family, clip_skip, families, tmp_path):
    folder, _ = families(family)
    encoder, prompts = load(folder).text, ["red boat", "", "the sea", "boat", "red"]
    texts = TextCache(tmp_path, encoder, clip_skip)
    assert texts.fill([*prompts, "red"]) == 5
    assert texts.fill(prompts) == 0
    for batch in (prompts, ["the sea"], ["red boat", LONG, ""]):
        ours, theirs = texts.read(batch), encoder.encode(batch, clip_skip)
        torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-5, atol=1e-5)
        assert (ours.pooled is None) == (theirs.pooled is None) == (family == "sd1")
        if ours.pooled is not None:
            torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-5, atol=1e-5)
    exact = encoder.encode([*prompts, *["red"] * 3], clip_skip)
    assert torch.equal(
        TextCache(tmp_path / "new", encoder, clip_skip).read(["red boat"]).tokens, exact.tokens[:1]
    )


def test_texts_are_always_encoded_as_many_at_once(tiny_folder, tmp_path, monkeypatch):
    """A matrix product may give other last bits for one row than for eight."""
    texts, counts, encode = TextCache(tmp_path, load(tiny_folder).text), [], TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda *args: counts.append(len(args[1])) or encode(*args))
    texts.fill([str(i) for i in range(11)])
    texts.read(["boat"])
    assert counts == [8, 8, 8]


def test_each_thing_that_matters_makes_another_text(tiny_folder, tmp_path):
    def entries(text, encoder, clip_skip=None):
        TextCache(tmp_path, encoder, clip_skip).read([text])
        return len(files(tmp_path))

    encoder = load(tiny_folder).text
    assert entries("boat", encoder) == 1
    assert entries("boat", load(tiny_folder).text, 0) == 1
    assert entries("sea", encoder) == 2
    assert entries("boat", encoder, 1) == 3
    assert entries("boat", load(tiny_folder, "bf16").text) == 4
    encoder.clips[0].tokenizer.add_tokens(["boat"])
    model = encoder.clips[0].model
    rows = model.get_input_embeddings().weight.detach()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([rows, rows[:1]])))
    assert entries("boat", encoder) == 5, "a learnt word"
    next(encoder.clips[0].model.parameters()).data[0, 0] += 1
    assert entries("boat", encoder) == 6, "its vector"


def test_a_module_s_digest_is_of_its_values():
    conv = torch.nn.Conv2d(3, 4, 3)
    digest = module_digest(conv, {})
    assert digest == module_digest(conv.to(memory_format=torch.channels_last), {}), "whatever their layout"
    assert len({digest, module_digest(conv, {"a": 1}), module_digest(conv.double(), {})}) == 3
