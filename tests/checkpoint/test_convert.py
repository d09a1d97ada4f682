"""`ldm convert`: every way, what it says, and what it refuses."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from original_layout import AutoencoderKL, Clip, OpenClip, UNetModel, checkpoint
from safetensors.torch import load_file, save_file
from tiny_families import make_family

from ldm.checkpoint.convert import convert as convert_model
from ldm.cli import main

UNET = {
    "channels": 64,
    "mult": (1, 2),
    "depths": (1, 0),
    "middle": 1,
    "context": 64,
    "in_channels": 4,
    "blocks": 1,
}
FILES = {
    "sd1": {
        "model.diffusion_model": (UNetModel, UNET | {"linear": False}),
        "first_stage_model": (AutoencoderKL, {"ch": 32, "mult": (1, 2), "blocks": 1}),
        "cond_stage_model.transformer": (Clip, {"width": 64, "layers": 2, "inner": 64}),
    },
    "sd2": {
        "model.diffusion_model": (UNetModel, UNET | {"linear": True}),
        "first_stage_model": (AutoencoderKL, {"ch": 32, "mult": (1, 2), "blocks": 1}),
        "cond_stage_model.model": (OpenClip, {"width": 64, "layers": 24, "inner": 64, "project": 64}),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families") / "sd1"
    make_family("sd1", folder)
    return folder


def convert(capsys, *arguments):
    code = main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def read(folder):
    return {
        f"{path.parent.name}.{name}": tensor
        for path in folder.glob("*/*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_folder_to_file_to_folder_is_equal_in_every_tensor(tmp_path, folder, capsys):
    assert convert(capsys, folder, tmp_path / "model.safetensors")[0] == 0
    code, out, _ = convert(capsys, tmp_path / "model.safetensors", tmp_path / "back")
    assert (code, out) == (0, f"{tmp_path / 'back'}\n")

    def plain(tensors):  # transformers 5.6 began to leave it out
        return {name.replace("text_encoder.text_model.", "text_encoder."): t for name, t in tensors.items()}

    assert_equal(plain(read(tmp_path / "back")), plain(read(folder)))


@pytest.mark.parametrize("family", FILES)
def test_file_to_folder_to_file_is_equal_in_every_tensor_that_is_used(tmp_path, capsys, family):
    original = checkpoint(FILES[family])
    save_file(original, tmp_path / "model.safetensors")
    code, out, _ = convert(capsys, tmp_path / "model.safetensors", tmp_path / "folder")
    assert code == 0
    assert convert(capsys, tmp_path / "folder", tmp_path / "back.safetensors")[0] == 0
    back = load_file(tmp_path / "back.safetensors")
    dropped = {
        line.removeprefix("not written: ") for line in out.splitlines() if line.startswith("not written")
    }
    assert_equal(back, {name: t for name, t in original.items() if name not in dropped})
    if family == "sd1":
        assert dropped == {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
    else:
        layers = {name for name in dropped if ".resblocks.23." in name}
        head = "cond_stage_model.model."
        assert len(layers) == 12
        assert dropped - layers == {f"{head}text_projection", f"{head}logit_scale"}


def test_averages_are_pruned_or_taken(tmp_path, capsys):
    original = checkpoint(FILES["sd1"])
    prefix = "model.diffusion_model."
    unet = [name for name in original if name.startswith(prefix)]
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): original[name] + 1 for name in unet
    }
    save_file(original | averages, tmp_path / "full.safetensors")
    for flag, added, said in (
        ("--no-ema", 0, f"model_ema.* ({len(unet)} tensors)"),
        ("--ema", 1, "in place of"),
    ):
        target = tmp_path / f"pruned{flag}.safetensors"
        code, out, _ = convert(capsys, tmp_path / "full.safetensors", target, flag)
        assert code == 0
        assert said in out
        written = load_file(target)
        assert not any(name.startswith("model_ema") for name in written)
        assert all(torch.equal(written[name], original[name] + added) for name in unet)


def test_dtype_and_shards(tmp_path, folder, capsys):
    assert convert(capsys, folder, tmp_path / "half", "--dtype", "fp16", "--max-shard-size", "50KB")[0] == 0
    assert (tmp_path / "half/unet/diffusion_pytorch_model.safetensors.index.json").exists()
    assert {tensor.dtype for tensor in read(tmp_path / "half").values()} == {torch.float16}


def test_a_target_that_is_there_is_kept_without_force(tmp_path, folder, capsys):
    target = tmp_path / "model.safetensors"
    target.write_text("mine")
    code, _, err = convert(capsys, folder, target)
    assert code == 2
    assert "--force" in err
    assert target.read_text() == "mine"
    assert convert(capsys, folder, target, "--force")[0] == 0
    assert convert(capsys, target, target, "--dtype", "bf16", "--force")[0] == 0  # in place
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.bfloat16}


def test_the_prediction_type_that_is_said_is_written(tmp_path, capsys):
    save_file(checkpoint(FILES["sd2"]), tmp_path / "model.safetensors")
    convert(
        capsys,
        tmp_path / "model.safetensors",
        tmp_path / "v.safetensors",
        "--prediction-type",
        "v_prediction",
    )
    _, out, _ = convert(capsys, tmp_path / "v.safetensors", tmp_path / "v")
    assert "assumed" not in out
    assert '"v_prediction"' in (tmp_path / "v/scheduler/scheduler_config.json").read_text()


def test_a_part_from_elsewhere_is_written(tmp_path, folder, capsys):
    other = tmp_path / "other"
    make_family("inpaint", other)
    assert convert(capsys, folder, tmp_path / "new", "--unet", other)[0] == 0
    index = (tmp_path / "new" / "model_index.json").read_text()
    assert "StableDiffusionInpaintPipeline" in index


@pytest.mark.parametrize("flags", [["--ema"], ["--prediction-type", "epsilon"]])
def test_flags_for_files_are_refused_for_folders(tmp_path, folder, capsys, flags):
    code, _, err = convert(capsys, folder, tmp_path / "new", *flags)
    assert code == 2
    assert "are for single files" in err
    assert not (tmp_path / "new").exists()


def test_the_script_is_the_command(tmp_path, folder, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "scripts" / "convert.py"
    argv = [script, folder, tmp_path / "model.safetensors", "--quiet"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name="__main__")
    assert (done.value.code, capsys.readouterr().out) == (0, "")
    assert (tmp_path / "model.safetensors").exists()


def test_what_is_not_read_is_said(tiny_folder, tmp_path):
    folder, lines = shutil.copytree(tiny_folder, tmp_path / "model"), []
    (folder / "unet" / "old.safetensors").write_bytes(b"whatever")
    convert_model(folder, tmp_path / "made.safetensors", log=lines.append)
    (line,) = lines
    assert line.startswith(f"{folder / 'unet'}: not read: old.safetensors, since diffusion_pytorch_model.")
