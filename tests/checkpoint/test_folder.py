"""Pipeline folders in all the spellings that are met in the wild, and back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import write_tokenizer

import ldm
from ldm.checkpoint import load_module, load_text_encoder, load_tokenizer, save_module
from ldm.checkpoint.folder import embedded
from ldm.checkpoint.parts import Defaults
from ldm.checkpoint.source import find
from ldm.prompts.world import World

TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"


def latents(folder):
    pipe = ldm.load(folder, device="cpu", dtype="fp32")
    return pipe("the red boat", seed=1, num_inference_steps=2, output_type="latent").images


def rename(path, new_name):
    tensors = load_file(path)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, path)
    return tensors.keys()


def test_text_encoder_with_and_without_prefix(tiny_folder, folder):
    wanted = latents(tiny_folder)
    rename(folder / TEXT, lambda name: f"text_model.{name.removeprefix('text_model.')}")
    tensors = load_file(folder / TEXT) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file(tensors, folder / TEXT)
    assert torch.equal(latents(folder), wanted)
    save_file(
        {k.removeprefix("text_model."): t for k, t in tensors.items() if "position_ids" not in k},
        folder / TEXT,
    )
    assert torch.equal(latents(folder), wanted)


def test_vae_with_the_old_names_of_its_attention(tiny_folder, folder):
    wanted = ldm.load(tiny_folder, device="cpu", dtype="fp32").decode(latents(tiny_folder))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name):
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    names = rename(folder / VAE, old_name)
    assert {old_name(name) for name in names} != set(names)
    assert torch.equal(ldm.load(folder, device="cpu", dtype="fp32").decode(latents(tiny_folder)), wanted)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_parts_are_ready_to_draw(tiny_folder, dtype):
    pipe = ldm.load(tiny_folder, device="cpu", dtype=dtype)
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {p.dtype for p in pipe.unet.parameters()} == {wanted}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32 if dtype == "fp16" else wanted}
    for module in (pipe.unet, pipe.vae, pipe.parts.text_encoder):
        assert not module.training
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
    weight = pipe.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_saved_folder_has_names_that_everybody_reads(tiny_folder, tmp_path):
    pipe = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    pipe.save(tmp_path / "saved", dtype=torch.float16)
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    text = load_file(tmp_path / "saved" / TEXT)
    assert all(name.startswith("text_model.") for name in text)
    assert {t.dtype for t in text.values()} == {torch.float16}
    assert load_file(tmp_path / "saved" / VAE).keys() == load_file(tiny_folder / VAE).keys()
    files = {path.name for path in (tmp_path / "saved/tokenizer").iterdir()}
    assert files == {"vocab.json", "merges.txt", "tokenizer_config.json"}


def test_saving_over_the_folder_that_is_open(folder):
    pipe = ldm.load(folder, device="cpu", dtype="fp32")
    before = latents(folder)
    pipe.save(folder)
    assert torch.equal(latents(folder), before)
    assert torch.equal(
        pipe("the red boat", seed=1, num_inference_steps=2, output_type="latent").images, before
    )


def test_tokenizer_of_both_kinds_of_files(tiny_folder, tmp_path):
    write_tokenizer(tmp_path)
    one, other = load_tokenizer(tiny_folder / "tokenizer"), load_tokenizer(tmp_path)
    for prompt in ("the red boat", "Sea's 42 ü", "", "<|endoftext|>"):
        assert one(prompt).input_ids == other(prompt).input_ids
    assert one.model_max_length == other.model_max_length == 16


def test_merges_cut_short(tmp_path):
    write_tokenizer(tmp_path)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-2]))
    with pytest.raises(ldm.UserError, match=r"merges\.txt: damaged or cut short \('th'"):
        load_tokenizer(tmp_path)


def test_modules_alone(tiny_folder, tmp_path):
    unet = load_module(tiny_folder / "unet", torch.float32)
    assert all(p.requires_grad for p in unet.parameters())
    save_module(unet, tmp_path / "unet")
    again = load_module(tmp_path / "unet")
    assert all(torch.equal(t, unet.state_dict()[name]) for name, t in again.state_dict().items())
    text = load_text_encoder(tiny_folder / "text_encoder", torch.bfloat16)
    assert text.text_model.final_layer_norm.weight.dtype is torch.bfloat16


def test_words_and_defaults_travel(tiny_folder, folder):
    (folder / "words.txt").write_text("sea\nred\n")
    (folder / "ldm.json").write_text('{"sampler": "euler", "num_inference_steps": 9}')
    (folder / "world.json").write_text('{"things": [[["boat", "boats"]]], "words": {"ark": "boat"}}')
    pipe = ldm.load(folder, device="cpu", dtype="fp32")
    pipe.save(folder)
    parts = ldm.load(folder, device="cpu", dtype="fp32").parts
    assert parts.words == {"red", "sea"}
    assert parts.world == World(things=((("boat", "boats"),),), words={"ark": "boat"})
    assert parts.defaults == Defaults(num_inference_steps=9, sampler="euler")


def test_embedded_model_of_an_installation(tiny_folder, tmp_path, monkeypatch):
    for name in ("postcard", "postcard-upscaler"):
        shutil.copytree(tiny_folder, tmp_path / name)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert embedded() == tmp_path / "postcard"
    assert ldm.load(device="cpu").name == "postcard"
    assert ldm.load("postcard-upscaler", device="cpu").name == "postcard-upscaler"
    assert find("postcard-upscaler") == tmp_path / "postcard-upscaler"


def test_a_folder_here_goes_before_an_embedded_model_of_its_name(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("postcard") == embedded()
    shutil.copytree(tiny_folder, tmp_path / "postcard")
    assert find("postcard").resolve() == tmp_path / "postcard"


def test_embedded_model_of_a_checkout(tiny_folder, tmp_path, monkeypatch):
    def not_installed(package):
        raise ModuleNotFoundError(package)

    shutil.copytree(tiny_folder, tmp_path / "weights" / "postcard")
    monkeypatch.setattr("importlib.resources.files", not_installed)
    monkeypatch.setattr("ldm.checkpoint.folder.__file__", str(tmp_path / "ldm/checkpoint/folder.py"))
    assert ldm.load(device="cpu").name == "postcard"
