"""Damaged model folders: each gives one or two lines that name the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import write_tokenizer

import ldm

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167534\n"


def complaint(folder):
    with pytest.raises(ldm.UserError) as caught:
        ldm.load(folder, device="cpu", dtype="fp32")
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


def edit_json(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_undamaged_folder_loads(folder):
    assert ldm.load(folder, device="cpu").name == "model"


def test_no_folder(tmp_path):
    assert f"{tmp_path / 'nowhere'}: no such folder or file" in complaint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}: empty" in complaint(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "empty/model_index.json" in complaint(tmp_path / "empty")


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", UNET, VAE, TEXT],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "pointer", "garbage", "directory"])
def test_damaged_file(folder, name, damage):
    path = folder / name
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "pointer": LFS.encode(), "garbage": b"\x00\xff" * 999}[damage])
    message = complaint(folder)
    assert str(path) in message
    if damage == "pointer":
        assert "git lfs pull" in message


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
@pytest.mark.parametrize("share", [0.0001, 0.1, 0.999])
def test_truncated_weights(folder, name, share):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = complaint(folder)
    assert str(path) in message
    assert "cut short" in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [(UNET, "conv_in.weight"), (VAE, "decoder.conv_out.bias"), (TEXT, "final_layer_norm.weight")],
)
def test_strict_tensors(tiny_folder, folder, name, tensor):
    path = folder / name
    key = next(key for key in load_file(path) if key.endswith(tensor))
    for change, words in (
        (lambda tensors: tensors.pop(key), "missing"),
        (lambda tensors: tensors.update({"lora.up": torch.zeros(1)}), "not of this model: lora.up"),
        (lambda tensors: tensors.update({key: torch.zeros(3, 2)}), "[3, 2]"),
    ):
        shutil.copy(tiny_folder / name, path)
        edit_tensors(path, change)
        message = complaint(folder)
        assert str(path) in message
        assert words in message
        assert tensor in message or "lora.up" in message


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("unet", ["diffusers", "UNet3DConditionModel"], "unet is a UNet3DConditionModel"),
        ("vae", ["diffusers", "VQModel"], "AutoencoderKL or AutoencoderTiny"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "only CLIPTextModel"),
        ("text_encoder_2", ["transformers", "CLIPTextModelWithProjection"], "has no tokenizer_2"),
        ("tokenizer", ..., "has no tokenizer"),
    ],
)
def test_model_index_of_another_pipeline(folder, part, value, words):
    edit_json(folder / "model_index.json", **{part: value})
    message = complaint(folder)
    assert str(folder / "model_index.json") in message
    assert words in message


def test_parts_that_drawing_does_without_are_ignored(folder):
    edit_json(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=[None, None],
    )
    ldm.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("unet/config.json", {"surprise": 1}, "surprise"),
        ("unet/config.json", {"_class_name": "UNet1DModel"}, "UNet1DModel"),
        ("vae/config.json", {"norm_num_groups": 5}, "norm_num_groups"),
        ("scheduler/scheduler_config.json", {"_class_name": "RePaintScheduler"}, "RePaint"),
        ("scheduler/scheduler_config.json", {"prediction_type": "guess"}, "guess"),
        ("text_encoder/config.json", {"hidden_size": 23}, "hidden_size = 23"),
    ],
)
def test_config_that_is_not_supported(folder, name, changes, words):
    edit_json(folder / name, **changes)
    message = complaint(folder)
    assert str(folder / name) in message
    assert words in message


def test_config_of_another_model_than_the_weights(folder):
    edit_json(folder / "unet/config.json", layers_per_block=2)
    message = complaint(folder)
    assert str(folder / UNET) in message
    assert "missing: down_blocks" in message


def test_parts_of_different_models(folder):
    def widen(tensors):
        for key in [key for key in tensors if "attn2.to_k" in key or "attn2.to_v" in key]:
            tensors[key] = torch.zeros(len(tensors[key]), 32)

    edit_json(folder / "unet/config.json", cross_attention_dim=32)
    edit_tensors(folder / UNET, widen)
    message = complaint(folder)
    assert f"{folder / 'unet'}: the U-Net takes text of width 32" in message
    assert f"text_encoder gives 24 ({folder / 'text_encoder'})" in message


@pytest.mark.parametrize("damage", ["missing", "empty", "pointer", "garbage"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_damaged_vocabulary(folder, name, damage):
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer")
    path = folder / "tokenizer" / name
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "pointer": LFS.encode(), "garbage": b"\x00\xff" * 999}[damage])
    assert str(path if damage != "garbage" else path.parent) in complaint(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "JSON object"),
        ('{"steps": 3}', "'steps'; it may hold num_inference_steps"),
    ],
)
def test_damaged_defaults(folder, content, words):
    (folder / "ldm.json").write_text(content)
    message = complaint(folder)
    assert str(folder / "ldm.json") in message
    assert words in message


def test_no_embedded_model(monkeypatch, tmp_path):
    monkeypatch.setattr("ldm.checkpoint.folder.__file__", str(tmp_path / "ldm/checkpoint/folder.py"))
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ldm.UserError, match="no embedded model"):
        ldm.load()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cuda:99"}, "'cuda:99' is not there; this machine has"),
        ({"device": "tpu"}, "'tpu' is unknown"),
        ({"dtype": "int8"}, "'int8' is not supported: give bf16, fp16 or fp32"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_device_and_dtype(tiny_folder, arguments, words):
    with pytest.raises(ldm.UserError) as caught:
        ldm.load(tiny_folder, **arguments)
    assert words in str(caught.value)
