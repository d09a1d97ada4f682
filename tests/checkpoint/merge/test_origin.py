"""What a merged model says it was made of: in every file, by SHA-256, and kept by `ldm convert`."""

import hashlib
import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_merge import varied

import ldm
from ldm.checkpoint.convert import convert
from ldm.checkpoint.merge import merge
from ldm.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory, families):
    """A folder a, and a file b.safetensors."""
    root = tmp_path_factory.mktemp("origin")
    a, b = (varied(families("sd1")[0], root / name, seed) for seed, name in enumerate("ab"))
    convert(b, root / "b.safetensors", log=lambda _: None)
    return a, root / "b.safetensors"


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def origin(path):
    metadata = header(path)
    return json.loads(metadata["sd_merge_recipe"]), json.loads(metadata["sd_merge_models"])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_says_what_it_was_made_of(tmp_path, models):
    a, b = models
    merge([b, a], tmp_path / "out", weights=[0.3], block_weights={"M00": 0.5}, parts=["unet"], log=str)
    files = sorted((tmp_path / "out").glob("*/*.safetensors"))
    assert len(files) == 3
    recipe, made_of = origin(files[0])
    assert all(origin(file) == (recipe, made_of) for file in files)
    assert recipe == {
        "type": "ldm",
        "version": ldm.__version__,
        "models": list(made_of),
        "method": "weighted sum",
        "weights": [0.7, 0.3],
        "block_weights": {"M00": 0.5},
        "parts": ["unet"],
        "dtype": None,
    }
    first, second = made_of.values()
    assert recipe["models"][0] == digest(b)
    assert first == {"name": "b.safetensors", "files": {"b.safetensors": digest(b)}, "sd_merge_recipe": None}
    theirs = {f"{path.parent.name}/{path.name}": digest(path) for path in a.glob("*/*.safetensors")}
    assert (second["name"], second["files"]) == ("a", theirs)


def test_a_merge_of_merges_has_the_whole_tree(tmp_path, models):
    a, b = models
    merge([a, b], tmp_path / "one.safetensors", weights=[0.3], log=str)
    given = [tmp_path / "one.safetensors", a, b]
    merge(given, tmp_path / "two.safetensors", add_difference=0.8, vae=b, log=str)
    inner, _ = origin(tmp_path / "one.safetensors")
    recipe, made_of = origin(tmp_path / "two.safetensors")
    assert (recipe["method"], recipe["multiplier"], recipe["vae"]) == ("add difference", 0.8, digest(b))
    assert recipe["models"][0] == digest(tmp_path / "one.safetensors")
    assert made_of[recipe["models"][0]]["sd_merge_recipe"] == inner
    assert {*inner["models"]} < made_of.keys()


def test_converting_keeps_it_and_info_tells_it(tmp_path, models, capsys):
    a, b = models
    merge([a, b], tmp_path / "one.safetensors", weights=[0.3], log=str)
    said = origin(tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "folder", log=str)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", log=str)
    assert origin(tmp_path / "back.safetensors") == said
    convert(tmp_path / "folder", tmp_path / "other", overrides={"unet": a / "unet"}, log=str)
    assert "sd_merge_recipe" not in header(tmp_path / "other/unet/diffusion_pytorch_model.safetensors")
    for path in ("one.safetensors", "folder"):
        assert main(["info", str(tmp_path / path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "weights: 0.7, 0.3" in lines
        assert f"model {digest(b)}: b.safetensors" in lines
    assert main(["info", str(b)]) == 2
    assert "does not say that it was merged" in capsys.readouterr().err


def test_what_others_wrote_there_does_no_harm(tmp_path, models):
    a, b = models
    tensors, odd = load_file(b), header(b) | {"sd_merge_recipe": "[not json", "sd_merge_models": "[1]"}
    save_file(tensors, tmp_path / "odd.safetensors", metadata=odd)
    merge([tmp_path / "odd.safetensors", a], tmp_path / "out.safetensors", log=lambda _: None)
    recipe, made_of = origin(tmp_path / "out.safetensors")
    assert made_of[recipe["models"][0]]["sd_merge_recipe"] is None
