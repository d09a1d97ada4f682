"""Faults that show before weights are read, and files that would fill the memory or take for ever."""

import json
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipeline import write_tokenizer

import ldm
from ldm.adapters.deltas import make_delta
from ldm.adapters.lora import read_lora
from ldm.checkpoint import folder as folders
from ldm.checkpoint.io import read_tensors
from ldm.checkpoint.source import find

LORA = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[: len(lines) // 2]))


# --- order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("tokenizer/vocab.json", cut, "not valid JSON"),
        ("tokenizer/merges.txt", cut, "not made by any merge"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 2}, "model_max_length = 2"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ("text_encoder/config.json", {"hidden_size": "x"}, "hidden_size = 'x'"),
        ("text_encoder/config.json", {"num_attention_heads": 7}, "num_attention_heads = 7"),
        ("text_encoder/config.json", {"architectures": ["BertModel"]}, "a BertModel"),
        ("text_encoder/model.safetensors", {"num_hidden_layers": 4}, "missing: encoder.layers.3"),
        ("text_encoder/model.safetensors", {"intermediate_size": 7}, "of the wrong shape"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
        ("unet/diffusion_pytorch_model.safetensors", {"layers_per_block": 2}, "missing"),
    ],
)
def test_nothing_is_cast_before_the_rest_is_checked(folder, monkeypatch, name, damage, words):
    monkeypatch.setattr(folders, "_load_network", lambda *_: pytest.fail("weights are read"))
    path = folder / name
    if damage is cut:
        write_tokenizer(folder / "tokenizer")
        (folder / "tokenizer" / "tokenizer.json").unlink()
        cut(path)
    else:
        edit_json(path if path.suffix == ".json" else path.with_name("config.json"), **damage)
    with pytest.raises(ldm.UserError) as caught:
        ldm.load(folder, device="cpu", dtype="fp32")
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_text_encoder_is_checked_without_transformers(folder, monkeypatch):
    edit_json(folder / "text_encoder/config.json", intermediate_size=7)
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it is an error
    with pytest.raises(ldm.UserError, match=r"mlp\.fc1"):
        ldm.load(folder, device="cpu")


# --- pickles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**20, 2**20),
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
)
def test_a_tensor_without_its_numbers(tmp_path, tensor):
    torch.save({LORA: tensor}, tmp_path / "a.bin")
    for read in (read_tensors, read_lora):
        with pytest.raises(ldm.UserError, match=r"a\.bin: tensor .* cannot be read"):
            read(tmp_path / "a.bin")


def test_a_compressed_pickle(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as a, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name) + b"\0" * 2**20 * name.endswith("data.pkl"))
    with pytest.raises(ldm.UserError, match=r"b\.pt: a compressed archive"):
        read_tensors(tmp_path / "b.pt")


# --- other files -----------------------------------------------------------------------------------------


def test_an_index_that_names_itself(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(ldm.UserError, match="not a file of this folder"):
        read_tensors(index)


@pytest.mark.parametrize(
    "change",
    [
        {"defaults": {"x": 1}},
        {"words": [[1]]},
        {"options": {"x": 1}},
        {"options": {"max_noise_level": "x"}},
        {"tokenizer": {"vocab": 3, "merges": [1]}},
        {"text_encoder": {"num_hidden_layers": 10**9}},
        {"text_encoder": {"num_hidden_layers": "x"}},
        {"unet": {"layers_per_block": 10**9}},
    ],
)
def test_what_we_write_into_a_header_is_checked(tiny_folder, tmp_path, change):
    file = tmp_path / "model.safetensors"
    ldm.load(tiny_folder, device="cpu", dtype="fp32").save(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    own = json.loads(metadata["ldm.config"])
    for name, value in change.items():
        own[name] = value if isinstance(value, list) else own[name] | value
    save_file(load_file(file), file, {**metadata, "ldm.config": json.dumps(own)})
    with pytest.raises(ldm.UserError, match=r"model\.safetensors: "):
        ldm.load(file, device="cpu", dtype="fp32")


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-that-name/model"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ldm.UserError, match="no such folder or file"):
        find(name)


@pytest.mark.parametrize("pattern", [r"(\w+)+!", ".*.*.*.*x"])
def test_a_pattern_that_takes_for_ever(tiny_folder, tmp_path, pattern):
    settings = {"unet.r": 2, "unet.lora_alpha": 2, "unet.rank_pattern": {pattern: 4}}
    name = LORA.replace("lora_A", "lora_{}")
    file = tmp_path / "a.safetensors"
    unet = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    weight = unet.unet.get_parameter(LORA.removeprefix("unet.").replace("lora_A.", ""))
    tensors = {name.format("A"): weight[:2].contiguous(), name.format("B"): weight[:, :2].contiguous()}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ldm.UserError, match="which cannot be"):
        unet.with_lora(file)


def test_a_layer_of_no_rows():
    factors = {f"hada_w{k}_{end}": torch.zeros(0, 0) for k in (1, 2) for end in "ab"}
    with pytest.raises(ldm.UserError, match="it changes a layer of"):
        make_delta(factors, 1.0).change(torch.zeros(4, 4))


def test_a_lora_in_a_folder_of_its_own_is_found_by_its_name(tiny_folder, tmp_path):
    from ldm.adapters import find_lora

    (tmp_path / "style").mkdir()
    file = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    save_file({LORA: torch.ones(2, 2)}, file)
    assert read_lora(tmp_path / "style").name == "style"
    assert find_lora("style", tmp_path) == file
