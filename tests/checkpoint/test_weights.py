"""Weights in all the files they come in: variants, shards, pickles; and what becomes of them in memory."""

import json
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint import load_module, load_parts, load_text_encoder
from ldm.checkpoint.fill import CHUNK, fill
from ldm.checkpoint.io import read_metadata, read_tensors, weight_files, write_tensors
from ldm.checkpoint.weights import choose_weights, find_weights
from ldm.errors import UserError
from ldm.runtime import choose

STEM = "diffusion_pytorch_model"


# --- which file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "variant", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, "model.safetensors"),
        (["pytorch_model.bin", "flax_model.msgpack"], None, "pytorch_model.bin"),
        (["model.safetensors", "model.fp16.safetensors"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], None, "pytorch_model.bin"),
        (["pytorch_model.fp16.bin", "model.safetensors"], "fp16", "pytorch_model.fp16.bin"),
        (["model.non_ema.safetensors", "model.safetensors"], None, "model.safetensors"),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
            None,
            "model.safetensors.index.json",
        ),
        (
            [
                "model.fp16-00001-of-00002.safetensors",
                "model.safetensors.index.fp16.json",
                "model.safetensors",
            ],
            "fp16",
            "model.safetensors.index.fp16.json",
        ),
        (["pytorch_model.bin.index.json", "model.safetensors"], None, "model.safetensors"),
    ],
)
def test_the_file_that_is_read(names, variant, wanted):
    assert choose_weights(names, Path("here"), "model", variant) == wanted


@pytest.mark.parametrize(
    ("names", "variant", "wanted", "words"),
    [
        (["model.fp16.safetensors"], None, "model.fp16.safetensors", "no plain file, so model.fp16"),
        (["model.safetensors"], "fp16", "model.safetensors", "no variant 'fp16', so model.safetensors"),
    ],
)
def test_another_variant_than_asked_for_is_told(tmp_path, names, variant, wanted, words):
    for name in names:
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=words):
        assert find_weights(tmp_path, "model", variant).name == wanted


@pytest.mark.parametrize(
    ("names", "variant", "words"),
    [
        (["model.fp16.safetensors", "model.non_ema.safetensors"], None, "only the variants fp16, non_ema"),
        (["model.safetensors"], "fp16", r"here/model\.fp16\.safetensors: no such file; found only model\.s"),
        (["model.onnx", "other.bin"], None, r"found only model\.onnx, other\.bin"),
        ([], None, "is the download complete"),
    ],
)
def test_no_file_that_could_be_meant(names, variant, words):
    with pytest.raises(UserError, match=words):
        choose_weights(names, Path("here"), "model", variant, needed=True)


UNREAD = {
    "unet": ["model.safetensors", "diffusion_pytorch_model_old.safetensors", "epoch9.ckpt", "unet.ema"],
    "vae": ["diffusion_pytorch_model.ema.safetensors", "vae-ft-mse-840000-ema-pruned.safetensors"],
    "text_encoder": ["diffusion_pytorch_model.safetensors", "model (1).safetensors", "MODEL.SAFETENSORS.BIN"],
    ".": ["pytorch_lora_weights.safetensors", "learned_embeds.bin", "learned_embeds-steps-500.safetensors"],
}
EXPECTED = {
    "unet": [f"{STEM}.bin", f"{STEM}.fp16.safetensors", f"{STEM}.non_ema.bin", f"{STEM}-00001-of-00002.bin"],
    "vae": ["README.md", f"{STEM}.msgpack", "openvino_model.bin", f"{STEM}.fp16-00001-of-00002.safetensors"],
    "text_encoder": ["pytorch_model.bin", "pytorch_model.fp16.bin", "flax_model.msgpack", "tf_model.h5"],
    ".": [".gitattributes", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt", "README.md"],
}


def warned(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_parts(folder, None)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in UNREAD for name in UNREAD[part]])
def test_weights_that_are_not_read_are_named_once(folder, part, name):
    (folder / part / name).write_bytes(b"whatever")
    (line,) = warned(folder)
    assert name in line
    assert line.startswith(f"{folder / part}: ")
    assert "not read" in line


def test_what_lies_in_most_folders_is_not_worth_a_line(folder):
    for part, names in EXPECTED.items():
        for name in names:
            (folder / part / name).write_bytes(b"whatever")
    for other in ("safety_checker", "feature_extractor", "image_encoder"):
        (folder / other).mkdir()
        (folder / other / "model.safetensors").write_bytes(b"whatever")
    assert warned(folder) == []


# --- the same model, stored otherwise --------------------------------------------------------------------


def same(module, other):
    wanted = other.state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in module.state_dict().items())


def as_pickle(folder, stem="diffusion_pytorch_model", to="diffusion_pytorch_model.bin", legacy=False):
    tensors = load_file(folder / f"{stem}.safetensors")
    torch.save(tensors, folder / to, _use_new_zipfile_serialization=not legacy)
    (folder / f"{stem}.safetensors").unlink()


def as_shards(folder, variant="", kind="safetensors", stem=STEM):
    """The weights in `folder` as diffusers shards them; returns the index and its weight_map."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    names, homes = sorted(tensors), {}
    for i in (0, 1):
        home = f"{stem}{variant and '.'}{variant}-0000{i + 1}-of-00002.{kind}"
        part = {name: tensors[name] for name in names[i::2]}
        (save_file if kind == "safetensors" else torch.save)(part, folder / home)
        homes |= dict.fromkeys(part, home)
    index = folder / f"{stem}.{kind}.index{variant and '.'}{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": homes}))
    return index, homes


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights(tiny_folder, folder, legacy):
    as_pickle(folder / "unet", legacy=legacy)
    as_pickle(folder / "text_encoder", "model", "pytorch_model.bin", legacy)
    assert same(load_module(folder / "unet"), load_module(tiny_folder / "unet"))
    assert same(load_text_encoder(folder / "text_encoder"), load_text_encoder(tiny_folder / "text_encoder"))


@pytest.mark.parametrize(("variant", "kind"), [("", "safetensors"), ("fp16", "safetensors"), ("", "bin")])
def test_sharded_weights(tiny_folder, folder, variant, kind):
    index, homes = as_shards(folder / "unet", variant, kind)
    module = load_module(folder / "unet", variant=variant or None)
    assert same(module, load_module(tiny_folder / "unet"))
    assert [path.name for path in weight_files(index)] == sorted(set(homes.values()))


def test_shards_that_diffusers_has_written(tiny_folder, tmp_path):
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    theirs.save_pretrained(tmp_path, max_shard_size="50KB", variant="fp16")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(load_module(tmp_path, variant="fp16"), theirs)


def test_a_variant_of_the_whole_pipeline(tiny_folder, folder):
    for part, stem in (("unet", STEM), ("vae", STEM), ("text_encoder", "model")):
        tensors = load_file(folder / part / f"{stem}.safetensors")
        halves = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(halves, folder / part / f"{stem}.fp16.safetensors")
    pipe = ldm.load(folder, device="cpu", dtype="fp32", variant="fp16")
    plain = ldm.load(folder, device="cpu", dtype="fp32")
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(plain.parts, part).half().float()
        assert same(getattr(pipe.parts, part), wanted)
    assert pipe.parts.weights.name == f"{STEM}.fp16.safetensors"


def test_the_hash_of_sharded_weights_tells_models_apart(folder):
    as_shards(folder / "unet")
    one = ldm.load(folder, device="cpu").model_hash
    shard = next((folder / "unet").glob("*00002-of*"))
    tensors = load_file(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard)
    assert ldm.load(folder, device="cpu").model_hash != one


def test_metadata(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, metadata={"modelspec.title": "ü"})
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "modelspec.title": "ü"}
    assert read_metadata(tmp_path / "x.ckpt") == {}


def test_a_training_program_s_checkpoint(tmp_path):
    content = {"state_dict": {"a": torch.ones(2), "epoch": 3}, "global_step": 7}
    torch.save(content, tmp_path / "x.ckpt")
    assert list(read_tensors(tmp_path / "x.ckpt")) == ["a"]


def test_a_callback_beside_the_weights_is_not_made(tmp_path, monkeypatch):
    """sd-v1-4.ckpt holds a callback of pytorch_lightning and numpy's numbers."""
    import numpy as np

    class ModelCheckpoint: ...

    name = "pytorch_lightning.callbacks.model_checkpoint"
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, parent, type(sys)(parent))
        sys.modules[name].ModelCheckpoint = ModelCheckpoint
        callbacks = {ModelCheckpoint: {"best": np.float64(0.5)}, "last": ModelCheckpoint()}
        torch.save({"callbacks": callbacks, "state_dict": {"a": torch.ones(2)}}, tmp_path / "x.ckpt")
    assert torch.equal(read_tensors(tmp_path / "x.ckpt")["a"], torch.ones(2))


# --- in memory -------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(24, 40, 3)
        self.point = torch.nn.Conv2d(24, 40, 1)
        self.linear = torch.nn.Linear(300, CHUNK // 200)  # more than one chunk
        self.scale = torch.nn.Parameter(torch.tensor(0.3))
        self.register_buffer("count", torch.arange(3))


def filled(tmp_path, stored, dtype):
    path = tmp_path / "x.safetensors"
    if not path.exists():
        wide = torch.nn.init.normal_(torch.empty(3)).tolist()
        net = Net()
        with torch.no_grad():
            net.conv.bias[:3] = torch.tensor(wide) * 1e-6  # subnormal in fp16
        write_tensors(path, net.state_dict(), stored)
    tensors = read_tensors(path)
    with torch.device("meta"):
        net = Net()
    return fill(net, tensors, path, dtype), tensors


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_the_cast_is_exactly_torch_s(tmp_path, stored, dtype):
    net, tensors = filled(tmp_path, stored, dtype)
    for name, tensor in net.state_dict().items():
        wanted = tensors[name] if name == "count" or dtype is None else tensors[name].to(dtype)
        assert tensor.dtype is wanted.dtype
        assert torch.equal(tensor, wanted), name


def test_what_the_file_has_stays_mapped(tmp_path):
    """Only the 3 x 3 convolution has another layout in memory than on disk."""
    net, tensors = filled(tmp_path, torch.bfloat16, torch.bfloat16)
    copied = {name for name, t in net.state_dict().items() if t.data_ptr() != tensors[name].data_ptr()}
    assert copied == {"conv.weight"}
    for conv in (net.conv, net.point):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    before = [tensor.data_ptr() for tensor in net.state_dict().values()]
    choose("cpu", "bf16").place(net)
    assert [tensor.data_ptr() for tensor in net.state_dict().values()] == before
    as_stored, tensors = filled(tmp_path, None, None)
    assert all(t.data_ptr() == tensors[name].data_ptr() for name, t in as_stored.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_a_caller_in_inference_mode(tmp_path, dtype):
    with torch.inference_mode():
        net, tensors = filled(tmp_path, torch.float16, dtype)
    assert torch.equal(net.conv.weight, tensors["conv.weight"].to(dtype))


def test_torch_s_threads_are_as_many_as_before(tmp_path):
    """In this thread and in those that begin later; also after an error."""
    found = []
    before = torch.get_num_threads()
    filled(tmp_path, torch.float16, torch.bfloat16)
    tensors = read_tensors(tmp_path / "x.safetensors")
    tensors["conv.weight"][0, 0, 0, 0] = torch.nan
    with torch.device("meta"):
        net = Net()
    with pytest.raises(UserError, match=r"conv\.weight holds NaN"):
        fill(net, tensors, tmp_path / "x.safetensors", torch.bfloat16)
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [torch.get_num_threads()] == [before]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("dtype", "extra"), [(torch.bfloat16, 64), (torch.float16, 0), (None, 0)])
def test_pages_of_the_file_are_let_go(tmp_path, dtype, extra):
    """64 MiB in fp16: no more than the copy in memory, and nothing where there is none."""

    def resident():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return {
            kind: int(re.search(rf"{kind}:\s+(\d+)", status)[1]) / 1024 for kind in ("RssAnon", "RssFile")
        }

    path = tmp_path / "x.safetensors"
    with torch.device("meta"):
        net = torch.nn.Linear(4096, 8192, bias=False)
    write_tensors(path, {"weight": torch.ones(8192, 4096, dtype=torch.float16)})
    before = resident()
    fill(net, read_tensors(path), path, dtype)
    after = resident()
    assert abs(after["RssFile"] - before["RssFile"]) < 8
    assert after["RssAnon"] - before["RssAnon"] == pytest.approx(extra, abs=8)
    assert net.weight.sum(dtype=torch.float64) == 8192 * 4096  # they come back when they are used


def test_an_old_file_whose_tensors_are_not_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(5), "b": torch.randn(3).half()}, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + b" " * 3
    while (8 + len(header)) % 4 != 1:
        header += b" "
    other = tmp_path / "y.safetensors"
    other.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    wanted = load_file(path)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_tensors(other).items())
