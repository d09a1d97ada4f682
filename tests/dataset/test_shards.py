"""WebDataset shards: the same pictures, captions and order as a folder's, and what is wrong with them."""

import io
import json
import shutil
import tarfile

import fsspec
import pytest
import torch
from tiny_finetune import arguments, result, run, write_pictures

import ldm
from ldm.cli import main
from ldm.dataset import cache, shards
from ldm.dataset.buckets import Batches, make_buckets
from ldm.dataset.cache import LatentCache
from ldm.dataset.examine import examine
from ldm.dataset.findings import Example
from ldm.dataset.shards import find_shards, read_index
from ldm.errors import UserError


def write_shard(path, members):
    """A tar of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 6)


@pytest.fixture
def tars(data, tmp_path):
    """The same pictures in two shards, the captions of one in .txt and of the other in .json."""
    (tmp_path / "tars").mkdir()
    for number, names in enumerate(("012", "345")):
        members = {}
        for name in names:
            caption = (data / f"{name}.txt").read_bytes()
            members[f"./{name}.png"] = (data / f"{name}.png").read_bytes()
            if number:
                members[f"./{name}.json"] = json.dumps({"id": 1, "caption": caption.decode()}).encode()
            else:
                members[f"./{name}.txt"] = caption
        write_shard(tmp_path / "tars" / f"{number:03}.tar", members)
    return tmp_path / "tars"


def facts(examined):
    return [(each.caption, each.size, each.digest, each.repeats) for each in examined.examples]


# --- the same as from the folder -------------------------------------------------------------------------


def test_shards_hold_what_the_folder_does(data, tars):
    ours, theirs = examine(tars), examine(data)
    assert facts(ours) == facts(theirs)
    assert ours.layout == "6 from shards"
    for mine, other in zip(ours.examples, theirs.examples, strict=True):
        assert mine.open().tobytes() == other.open().tobytes()
    assert str(ours.examples[4].path) == str(tars / "001.tar" / "4.png")


def test_training_on_shards_and_on_latents_in_shards_gives_the_numbers_of_the_folder(
    families, data, tars, tmp_path, monkeypatch
):
    model, options = families("sd1")[0], {"held_out": 0.2, "random_flip": True, "caption_dropout": 0.2}
    options["num_validation_images"] = 0
    assert run(model, data, tmp_path / "folder" / "run", **options) == 0
    assert run(model, tars, tmp_path / "tars-run" / "run", **options) == 0
    assert result(tmp_path / "tars-run" / "run") == result(tmp_path / "folder" / "run")

    kept = {"cache_dir": tmp_path / "kept", **options}
    argv = arguments(model, tars, tmp_path / "latents" / "run", **kept)
    assert main(["precompute", *argv[1:]]) == 0
    assert len(list((tmp_path / "kept").glob("*/*.tar"))) == 2
    assert not list((tmp_path / "kept").rglob("*.safetensors"))

    def closed(*_, **__):
        raise AssertionError("a picture was opened, or a shard read through")

    monkeypatch.setattr(Example, "open", closed)
    monkeypatch.setattr(shards, "_members", closed)
    assert main(argv) == 0
    assert result(tmp_path / "latents" / "run") == result(tmp_path / "folder" / "run")


def test_a_url_is_read_by_places_alone(data, tars):
    """fsspec's store in memory; {000..001} counts."""
    store = fsspec.filesystem("memory")
    for path in tars.iterdir():
        store.pipe(f"/shards/{path.name}", path.read_bytes())
    examined = examine("memory://shards/{000..001}.tar")
    assert facts(examined) == facts(examine(data))
    assert [each.open().size for each in examined.examples][:3] == [(64, 64), (96, 64), (56, 80)]
    store.pipe("/shards/001.tar", b"gone" * 10)
    with pytest.raises(UserError, match=r"cannot read the shard memory://shards/001\.tar: it is shorter"):
        examined.examples[5].open()


def rows(names, index):
    return [(each.name, each.place, each.found.digest, each.caption) for each in read_index(names, index)]


def test_an_index_is_made_once_for_a_shard_as_it_is(tars, tmp_path, monkeypatch):
    names = find_shards(tars)
    first = rows(names, tmp_path / "index")
    (damaged, _) = sorted((tmp_path / "index").iterdir())
    damaged.write_text("[[")
    assert rows(names, tmp_path / "index") == first
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_members", None)
        assert rows(names, tmp_path / "index") == first
    shutil.copy(tars / "000.tar", tars / "001.tar")
    assert [member.name for member in read_index(names, tmp_path / "index")] == [
        "./0.png",
        "./1.png",
        "./2.png",
    ] * 2


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        (
            "s3://b/{0..1}/{0..1}.tar",
            ["s3://b/0/0.tar", "s3://b/0/1.tar", "s3://b/1/0.tar", "s3://b/1/1.tar"],
        ),
        ("https://host/one.tar", ["https://host/one.tar"]),
        ("pictures", []),
    ],
)
def test_which_shards_are_meant(place, found):
    assert find_shards(place) == found


def test_a_folder_of_pictures_with_a_tar_in_it_is_one_of_pictures(data, tars, tmp_path):
    mixed = shutil.copytree(data, tmp_path / "mixed")
    shutil.copy(tars / "000.tar", mixed)
    assert find_shards(mixed) == []


# --- what is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[: len(data) // 2 // 512 * 512], "unexpected end of data|it ends within|ends"),
        (lambda data: b"<html>" * 200, "invalid header"),
        (lambda data: b"", "empty file"),
        (None, "there is none"),
    ],
)
def test_a_shard_that_cannot_be_read_is_named(tars, capsys, tmp_path, damage, said):
    broken = tars / "001.tar"
    if damage is None:
        broken.unlink()
        place = str(tars / "{000..001}.tar")
    else:
        broken.write_bytes(damage(broken.read_bytes()))
        place = tars
    with pytest.raises(
        UserError, match=rf"cannot read the shard {broken}: .*({said}).*; mend it or leave it out"
    ):
        examine(place)


def test_what_is_wrong_inside_a_shard_is_told_as_of_a_folder(data, tmp_path):
    picture = (data / "0.png").read_bytes()
    members = {
        "a.png": picture,
        "b.png": picture[:900],
        "b.txt": b"red",
        "c.png": (data / "1.png").read_bytes(),
    }
    members |= {"c.txt": b" ", "d.txt": b"no picture", "e.png": b"<html>", "e.json": b"[]", ".png": b"?"}
    write_shard(tmp_path / "x.tar", members)
    examined = examine(tmp_path / "x.tar", missing_caption="skip")
    told = [(found.kind, found.path.name, found.effect) for found in examined.findings if found.path]
    assert ("missing caption", "a.png", "skipped") in told
    assert ("missing caption", "c.png", "skipped") in told
    assert ("truncated", "b.png", "skipped") in told
    assert ("not an image", "e.png", "skipped") in told
    assert not examined.can_train
    assert examine(tmp_path / "x.tar", instance_prompt="a boat").examples[1].caption == "a boat"


def test_a_picture_that_has_changed_in_its_shard_is_refused(tars):
    first = examine(tars).examples[0]
    whole = bytearray((tars / "000.tar").read_bytes())
    whole[first.place.offset + 50] ^= 1
    (tars / "000.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"0\.png has changed since it was examined: run the same"):
        first.open()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "controlnet", "control_data_dir": "maps"}, "not with shards: give preprocess"),
        ({"center_crop": False}, "encodes each picture anew: there is nothing to precompute"),
    ],
)
def test_what_does_not_go_with_shards_is_said_at_once(tars, tmp_path, capsys, options, said):
    argv = arguments(tmp_path / "no-model", tars, tmp_path / "out", **options)
    assert main(["precompute", *argv[1:]]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- entries of a cache in shards ------------------------------------------------------------------------


def test_entries_in_shards_are_the_same_and_damaged_ones_made_again(tiny_folder, data, tmp_path, monkeypatch):
    vae = ldm.load(tiny_folder, device="cpu", dtype="fp32").parts.vae
    shown = list(Batches(examine(data).examples, [make_buckets(64, unit=8)], 1, 0).crops())
    kept = LatentCache(tmp_path, vae)
    assert kept.fill(shown) == 6
    one_size = [each for each in shown if each[1].size == shown[0][1].size]
    before = kept.read(one_size)
    monkeypatch.setattr(cache, "SHARD_BYTES", 3000)
    assert kept.store.pack() == 6
    tars = sorted(tmp_path.glob("*.tar"))
    assert len(tars) > 1
    assert sorted(tmp_path.iterdir()) == tars

    again = LatentCache(tmp_path, vae)
    monkeypatch.setattr(again, "_make", None)
    assert torch.equal(again.read(one_size).mean, before.mean)
    assert again.fill(shown) == 0

    raw = bytearray(tars[0].read_bytes())
    raw[700:1500] = bytes(800)
    tars[0].write_bytes(raw)
    mended = LatentCache(tmp_path, vae)
    assert mended.fill(shown) > 0
    assert torch.equal(mended.read(one_size).std, before.std)
