"""Damaged and hostile weights: each gives one or two lines that name the file, soon, and runs nothing."""

import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import make_family

import ldm

STEM = "diffusion_pytorch_model"
UNET, VAE, TEXT = f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors", "text_encoder/model.safetensors"


def complaint(folder, **options):
    start = time.process_time()
    with pytest.raises(ldm.UserError) as caught:
        ldm.load(folder, device="cpu", dtype="fp32", **options)
    assert time.process_time() - start < 2
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


class Bomb:
    """A pickle that makes a file when it is read without care."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def write_bomb(path, trace, zipped):
    content = {"weight": torch.ones(2), "bomb": Bomb(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert trace.exists()  # it does go off where pickles are trusted
    trace.rmdir()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("part", "name"), [("unet", f"{STEM}.bin"), ("text_encoder", "pytorch_model.bin")])
def test_a_pickle_with_code_is_not_run(folder, tmp_path, part, name, zipped):
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    write_bomb(folder / part / name, tmp_path / "trace", zipped)
    message = complaint(folder)
    assert str(folder / part / name) in message
    assert f"holds code ({os.name}.mkdir), which was not run" in message
    assert "convert" in message
    assert not (tmp_path / "trace").exists()


def test_a_single_file_with_code_is_not_run(tmp_path):
    write_bomb(tmp_path / "model.ckpt", tmp_path / "trace", True)
    message = complaint(tmp_path / "model.ckpt")
    assert f"{tmp_path / 'model.ckpt'}: holds code ({os.name}.mkdir), which was not run" in message
    assert not (tmp_path / "trace").exists()


def test_a_plain_pickle_with_code_is_not_run(folder, tmp_path):
    (folder / UNET).unlink()
    path = folder / f"unet/{STEM}.bin"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "trace"), protocol=2))
    assert str(path) in complaint(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_by_another_name(folder, tmp_path, zipped):
    write_bomb(tmp_path / "bomb.bin", tmp_path / "trace", zipped)
    shutil.copy(tmp_path / "bomb.bin", folder / UNET)
    message = complaint(folder)
    assert f"{folder / UNET}: a pickle by another name; rename it" in message
    assert not (tmp_path / "trace").exists()


def test_safetensors_and_zip_by_another_name(folder):
    path = (folder / UNET).rename(folder / f"unet/{STEM}.bin")
    assert f"{path}: a safetensors file by another name; rename it to .safetensors" in complaint(folder)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme.txt", "not weights")
    assert f"{path}: damaged, cut short or no weights of torch" in complaint(folder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_pickle(folder, zipped, share):
    path = folder / f"unet/{STEM}.bin"
    torch.save(load_file(folder / UNET), path, _use_new_zipfile_serialization=zipped)
    (folder / UNET).unlink()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in complaint(folder)


def rewrite(path, change):
    """Change the header of a safetensors file, and nothing else of it."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])


def overlap(header):
    one, other = sorted(
        (e for k, e in header.items() if k != "__metadata__"), key=lambda e: e["data_offsets"]
    )[:2]
    other["data_offsets"][0] -= 4
    one["data_offsets"][1] += 0


def beyond(header):
    last = max((e for k, e in header.items() if k != "__metadata__"), key=lambda e: e["data_offsets"])
    last["data_offsets"][1] += 2**40


def other_shape(header):
    next(e for k, e in header.items() if k.endswith("conv_in.weight"))["shape"] = [2**40, 2**40]


def other_dtype(header):
    next(e for k, e in header.items() if k.endswith("conv_in.weight"))["dtype"] = "F4"


@pytest.mark.parametrize("change", [overlap, beyond, other_shape, other_dtype])
def test_a_header_that_lies(folder, change):
    rewrite(folder / UNET, change)
    message = complaint(folder)
    assert str(folder / UNET) in message
    assert "fetch it again" in message


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**40, 2**31])
def test_a_header_of_absurd_size(folder, size):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(size.to_bytes(8, "little") + content[8:])
    assert f"{folder / UNET}: damaged or cut short" in complaint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [(UNET, "conv_out.weight"), (VAE, "decoder.conv_out.bias"), (TEXT, "final_layer_norm.weight")],
)
def test_weights_that_are_not_numbers(folder, file, tensor, value):
    tensors = load_file(folder / file)
    name = next(name for name in tensors if name.endswith(tensor))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / file)
    message = complaint(folder)
    assert f"{folder / file}: tensor " in message
    assert f"{tensor} holds NaN or Inf" in message


def test_weights_too_large_for_the_dtype(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_out.weight"][0, 0, 0, 0] = 1e5
    save_file(tensors, folder / UNET)
    ldm.load(folder, device="cpu", dtype="bf16")
    with pytest.raises(ldm.UserError, match=r"conv_out\.weight is too large for float16; give another dtype"):
        ldm.load(folder, device="cpu", dtype="fp16")


def test_a_sum_that_overflows_is_no_fault(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_out.bias"][:] = 3e38
    save_file(tensors, folder / UNET)
    assert ldm.load(folder, device="cpu", dtype="fp32").unet.conv_out.bias[0] == 3e38


# --- indices ---------------------------------------------------------------------------------------------


@pytest.fixture
def index(folder):
    """The U-Net's weights in two files and an index; its path."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    homes = {}
    for i in (1, 2):
        home = f"{STEM}-0000{i}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i - 1 :: 2]}
        save_file(part, folder / "unet" / home)
        homes |= dict.fromkeys(part, home)
    path = folder / f"unet/{STEM}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    ldm.load(folder, device="cpu")
    return path


def edit(index, change):
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["absolute", "parent", "below", "windows", "here"])
def test_an_index_that_leaves_its_folder(folder, index, kind):
    shutil.copy(index.with_name(f"{STEM}-00001-of-00002.safetensors"), folder / "other.safetensors")
    (index.parent / "sub").mkdir()
    shutil.copy(folder / "other.safetensors", index.parent / "sub")
    place = {
        "absolute": str(folder / "other.safetensors"),
        "parent": "../other.safetensors",
        "below": "sub/other.safetensors",
        "windows": "..\\other.safetensors",
        "here": "..",
    }[kind]
    edit(index, lambda homes: homes.update({name: place for name in homes if "00001" in homes[name]}))
    message = complaint(folder)
    assert str(index) in message
    assert "which is not a file of this folder" in message


def test_an_index_that_names_a_missing_file(folder, index):
    shard = index.with_name(f"{STEM}-00002-of-00002.safetensors")
    shard.unlink()
    message = complaint(folder)
    assert str(shard) in message
    assert "is the download complete?" in message


def test_a_tensor_in_the_wrong_file(folder, index):
    def swap(homes):
        homes["conv_in.weight"] = next(home for home in homes.values() if home != homes["conv_in.weight"])

    edit(index, swap)
    message = complaint(folder)
    assert str(index) in message
    assert "tensor conv_in.weight should be in" in message


def test_a_tensor_in_two_files(folder, index):
    one, other = (index.with_name(f"{STEM}-0000{i}-of-00002.safetensors") for i in (1, 2))
    first = load_file(one)
    name = sorted(first)[0]
    save_file(load_file(other) | {name: first[name]}, other)
    message = complaint(folder)
    assert str(index) in message
    assert f"tensor {name} should be in {one.name}, but it is in {other.name}" in message


def test_a_tensor_that_is_in_no_file(folder, index):
    edit(index, lambda homes: homes.update({"lost": f"{STEM}-00002-of-00002.safetensors"}))
    assert "tensor lost should be in" in complaint(folder)
    edit(index, lambda homes: homes.pop("lost"))
    edit(index, lambda homes: homes.pop("conv_in.weight"))
    assert "tensor conv_in.weight should be in no file" in complaint(folder)


def test_a_tensor_listed_twice(folder, index):
    text = index.read_text()
    index.write_text(text.replace('"weight_map": {', '"weight_map": {"conv_in.weight": "a.safetensors", '))
    message = complaint(folder)
    assert str(index) in message
    assert "'conv_in.weight' is listed twice" in message


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_without_files(folder, index, content):
    index.write_text(content)
    assert f"{index}: has no weight_map" in complaint(folder)


def test_json_without_end(folder):
    (folder / "unet/config.json").write_text('{"a": ' + "[" * 100_000)
    assert f"{folder / 'unet/config.json'}: not valid JSON" in complaint(folder)


# --- code and classes of the model's own -----------------------------------------------------------------


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def trap(folder, tmp_path):
    """Python files in every place from which a loader might take them; the trace that they would leave."""
    code = f"import os; os.mkdir({str(tmp_path / 'trace')!r})\nclass X: ...\n"
    for place in ("pipeline.py", "custom_module.py", "unet/custom_module.py", "text_encoder/modeling.py"):
        (folder / place).write_text(code)
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"],
)
def test_a_config_that_names_code(folder, trap, name):
    edit_json(folder / name, auto_map={"AutoModel": "modeling.X", "AutoTokenizer": ["modeling.X", None]})
    message = complaint(folder)
    assert f"{folder / name}: names code of the model's own (auto_map), which is never run" in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_an_index_that_names_code(folder, trap, part):
    edit_json(folder / "model_index.json", **{part: ["custom_module", "X"]})
    message = complaint(folder)
    assert f"{folder / 'model_index.json'}: {part} is custom_module.X, code of the model's own" in message


@pytest.mark.parametrize("name", [["pipeline", "X"], "X", "FluxPipeline", None])
def test_a_pipeline_of_another_class(folder, trap, name):
    edit_json(folder / "model_index.json", _class_name=name)
    message = complaint(folder)
    assert f"{folder / 'model_index.json'}: _class_name {name!r} cannot be read" in message


def test_a_script_beside_a_sound_model_is_left_alone(folder, trap):
    ldm.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["CLIPModel", "X"])
def test_a_text_encoder_of_another_class(folder, name):
    edit_json(folder / "text_encoder/config.json", architectures=[name])
    message = complaint(folder)
    assert str(folder / "text_encoder/config.json") in message
    assert name in message


def test_missing_text_encoder(folder):
    edit_json(folder / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ldm.UserError, match="no text encoder: give prompt_embeds"):
        ldm.load(folder, device="cpu", dtype="fp32")("a boat", num_inference_steps=1)
    edit_json(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    shutil.rmtree(folder / "text_encoder")
    assert str(folder / "text_encoder" / "config.json") in complaint(folder)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_xl_without_one_of_its_text_encoders(tmp_path, part):
    make_family("sdxl", tmp_path / "model")
    path = tmp_path / "model/model_index.json"
    tokenizer = part.replace("text_encoder", "tokenizer")
    edit_json(path, **{part: [None, None], tokenizer: [None, None]})
    message = complaint(tmp_path / "model")
    assert f"{tmp_path / 'model/unet'}: the U-Net takes text of width 64" in message


def test_an_upscaler_without_its_second_scheduler(tmp_path):
    make_family("upscaler", tmp_path / "model")
    edit_json(tmp_path / "model/model_index.json", low_res_scheduler=[None, None])
    assert "has no low_res_scheduler" in complaint(tmp_path / "model")


def test_a_refiner_that_says_it_wants_sizes(tmp_path):
    make_family("refiner", tmp_path / "model")
    edit_json(tmp_path / "model/model_index.json", requires_aesthetics_score=False)
    assert "does not take 6 sizes and pooled text of width 20" in complaint(tmp_path / "model")


def test_nothing_is_loaded_after_a_fault(folder, monkeypatch):
    """A fault in the last part read leaves nothing behind but the error."""
    made = []
    monkeypatch.setattr("ldm.pipeline.Pipeline.from_parts", lambda *_: made.append(1))
    (folder / UNET).write_bytes(b"")
    assert "empty" in complaint(folder)
    assert made == []
    assert Path(folder / UNET).exists()
