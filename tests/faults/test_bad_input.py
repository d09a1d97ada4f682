"""What users get wrong: one clear line, exit code 2, nothing half-written."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from ldm import cli

SIDE = "it must be a multiple of 8 from 8 to 4096"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_model(monkeypatch):
    """These mistakes must be found before any model is loaded."""

    def load(args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ldm.cli.drawing.draw.load", load)
    monkeypatch.setattr("ldm.cli.drawing.redraw.load", load)


def fails(capsys, argv, command=cli.txt2img):
    """Run a command that must fail with 2 and one line, or two; what it says."""
    before = sorted(Path().rglob("*"))
    try:
        code = command(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") in (1, 2)
    assert len(err) < 600
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--H", "100"], f"height 100 is not allowed: {SIDE}"),
        (["--W", "0"], f"width 0 is not allowed: {SIDE}"),
        (["--W", "-64"], f"width -64 is not allowed: {SIDE}"),
        (["-H", "1000000"], f"height 1000000 is not allowed: {SIDE}"),
        (["-H", "12.5"], "invalid int value: '12.5'"),
        (["--steps", "0"], "--steps 0 is not allowed: it must be a whole number from 1 to 1000"),
        (["--ddim_steps", "1001"], "--steps 1001 is not allowed"),
        (["--scale", "nan"], "--guidance-scale nan is not allowed: it must be a finite number"),
        (["--scale", "inf"], "--guidance-scale inf is not allowed: it must be a finite number"),
        (["--scale", "high"], "invalid float value: 'high'"),
        (["--ddim_eta", "1.5"], "eta 1.5 is not allowed: it must be a number from 0 to 1"),
        (["--eta", "nan"], "eta nan is not allowed"),
        (["--guidance_rescale", "2"], "--guidance-rescale 2.0 is not allowed"),
        (["--clip-skip", "-1"], "--clip-skip -1 is not allowed"),
        (["--sampler", "dpm++ 2n"], "unknown sampler 'dpm++ 2n': did you mean dpmpp_2"),
        (["--sampler", ""], "sampler"),
        (["--scheduler", "karas"], "karras"),
        (["--seed", str(2**63)], "--seed 9223372036854775808 is not allowed"),
        (["--seed", str(2**63 - 1), "--n_samples", "2"], "--seed 9223372036854775808 is not allowed"),
        (["--n_samples", "0"], "0 is not a whole number from 1 up"),
        (["--n_iter", "-1"], "-1 is not a whole number from 1 up"),
        (["--n_iter", "1000000"], "1000000 pictures are too many for one run"),
        (["--threads", "0"], "0 is not a whole number from 1 up"),
        (["--precision", "half"], "half is not one of full, autocast"),
        (["--plms", "--dpm_solver"], "not allowed with argument"),
        (["--from-file", "x"], "not allowed with argument"),
        (["--prom", "x"], "unrecognized arguments: --prom"),
        (["--n_sample", "2"], "unrecognized arguments"),
        (["--outdir"], "expected one argument"),
    ],
)
def test_bad_values(capsys, no_model, argv, message):
    assert message.lower() in fails(capsys, ["--prompt", "a boat", *argv]).lower()


def test_no_prompt_at_all(capsys, no_model):
    assert "-p/--prompt --from-file is required" in fails(capsys, [])


def test_a_prompt_that_is_not_text(capsys, no_model):
    assert "valid Unicode text" in fails(capsys, ["--prompt", "a \udcff boat"])
    assert "valid Unicode text" in fails(capsys, ["--prompt", "a", "-n", "a\0b"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read prompts from prompts.txt: No such file"),
        (b"\n \n", "no prompts in prompts.txt: write one per line"),
        (b"\xff\xfe\x00", "cannot read prompts from prompts.txt: it is not UTF-8 text"),
    ],
)
def test_bad_prompt_files(capsys, no_model, content, message):
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    assert message in fails(capsys, ["--from-file", "prompts.txt"])


def test_output_that_cannot_be_written(capsys, no_model):
    Path("file").touch()
    Path("folder.png").mkdir()
    prompt = ["--prompt", "a boat"]
    assert "cannot write to file" in fails(capsys, [*prompt, "--outdir", "file"])
    assert "cannot write to file/below" in fails(capsys, [*prompt, "--outdir", "file/below"])
    assert "cannot write to file" in fails(capsys, [*prompt, "--output", "file/a.png"])
    assert "folder.png must name a file, and is a folder" in fails(capsys, [*prompt, "-o", "folder.png"])
    assert "a.gif must name a .png, .jpg, .jpeg, .webp or .avif file" in fails(
        capsys, [*prompt, "-o", "a.gif"]
    )
    assert "names one file, but 2 pictures" in fails(capsys, [*prompt, "-o", "a.png", "--n_samples", "2"])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_output_on_a_file_system_that_takes_no_files(capsys, no_model):
    assert "cannot write to /proc/pictures" in fails(capsys, ["-p", "a", "--outdir", "/proc/pictures"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(capsys, no_model):
    Path("closed").mkdir(mode=0o500)
    assert "cannot write to closed" in fails(capsys, ["-p", "a", "--outdir", "closed"])


@pytest.mark.parametrize("command", ["info", "redraw"])
def test_bad_pictures(capsys, no_model, command):
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    assert "cannot read absent.png" in fails(capsys, [command, "absent.png"], cli.main)
    assert "cannot read a.png" in fails(capsys, [command, "a.png"], cli.main)


# --- with the tiny model -----------------------------------------------------------------------------------


def test_a_model_that_is_not_there(capsys):
    assert "no-such-folder" in fails(capsys, ["-p", "a", "-m", "no-such-folder"])


def test_a_folder_that_is_no_model(capsys):
    Path("empty").mkdir()
    assert "empty" in fails(capsys, ["-p", "a", "-m", "empty"])


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "cut", "noise"])
def test_a_damaged_model_names_the_file(capsys, tiny_folder, name, fault):
    shutil.copytree(tiny_folder, "model")
    path = Path("model", name)
    if path.is_dir():
        shutil.rmtree(path)
    elif fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(bytes(range(256)) * 8)
    line = fails(capsys, ["-p", "a", "-m", "model"])
    assert Path(name).parts[0] in line
    assert Path(name).name in line or fault == "missing"


def test_a_missing_tensor_is_named(capsys, tiny_folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder, "model")
    path = "model/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")
    save_file(tensors, path)
    line = fails(capsys, ["-p", "a", "-m", "model"])
    assert "conv_in.weight" in line
    assert "conv_inn.weight" in line


def test_a_model_of_another_shape_than_its_config(capsys, tiny_folder):
    shutil.copytree(tiny_folder, "model")
    path = Path("model/unet/config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    config["cross_attention_dim"] *= 2
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "unet" in fails(capsys, ["-p", "a", "-m", "model"])


def test_a_device_and_a_dtype_that_are_not_there(capsys, tiny_folder):
    argv = ["-p", "a", "-m", str(tiny_folder)]
    assert "'toaster'" in fails(capsys, [*argv, "--device", "toaster"])
    assert "'cuda:99'" in fails(capsys, [*argv, "--device", "cuda:99"])
    assert "'int8'" in fails(capsys, [*argv, "--dtype", "int8"])


@pytest.mark.parametrize("prompt", ["", " ", "boat " * 2000, "🚤" * 2000, "(((", "a\nb\tc"])
def test_strange_prompts_are_drawn(tiny_folder, prompt):
    argv = ["-p", prompt, "-m", str(tiny_folder), "--steps", "1", "-o", "a.png", "--dtype", "fp32"]
    assert cli.txt2img([*argv, "--quiet"]) == 0
    assert Path("a.png").stat().st_size > 100


def test_the_empty_prompt_draws_unconditionally(tiny_folder):
    from PIL import Image

    argv = ["-m", str(tiny_folder), "--steps", "2", "--dtype", "fp32", "--quiet", "-p", ""]
    assert cli.txt2img([*argv, "-o", "a.png", "--scale", "7.5"]) == 0
    assert cli.txt2img([*argv, "-o", "b.png", "--scale", "1"]) == 0
    with Image.open("a.png") as guided, Image.open("b.png") as plain:
        levels = [abs(a - b) for a, b in zip(guided.tobytes(), plain.tobytes(), strict=True)]
    assert max(levels) <= 1  # guidance away from the empty prompt towards itself changes nothing
