"""The three trainers as a user runs them: on a folder of images, one after the other, to a picture."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ldm
from ldm.checkpoint import load_parts
from ldm.checkpoint.parts import Defaults
from ldm.models import build
from ldm.pretrain import postcard
from ldm.pretrain.vae import load_vae

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
            tmp_path / "mine" / f"{i}.png"
        )
        (tmp_path / "mine" / f"{i}.txt").write_text(f"picture number {i}")
    return tmp_path / "mine"


def small(name: str, tmp_path: Path) -> Path:
    """The shipped recipe with a tiny model, as a file."""
    recipe = yaml.safe_load((ROOT / "configs" / f"postcard_{name}.yaml").read_text())
    model = recipe["model"]
    if name == "vae":
        model |= {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
    if name == "clip":
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model["text_config"] |= tower
        model["vision_config"] |= tower | {"patch_size": 8}
    if name == "unet":
        model["unet"] |= {"block_out_channels": [16, 16, 16], "cross_attention_dim": 16, "sample_size": 4}
        model["unet"] |= {"attention_head_dim": 2, "addition_embed_type_num_heads": 2}
        model["defaults"]["num_inference_steps"] = 1
        model["prompts"] = ["picture"]
    if name == "upscaler_vae":
        model |= {"block_out_channels": [8, 8]}
    if name == "upscaler":
        model["unet"] |= {"block_out_channels": [8, 8], "sample_size": 16}
    if name == "student":
        model["prompts"] = ["picture"] * 2  # one would be too few numbers for GroupNorm
    recipe["data"] = {"size": 32, "held_out": 2, "cache": str(tmp_path / "cache")}
    recipe["optimiser"]["train_batch_size"] = 2
    recipe["run"] = {"max_train_steps": 2, "logging_steps": 1}
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / f"{name}.yaml"


def run(monkeypatch, name: str, *args: object) -> None:
    """scripts/train_<name>.py, or scripts/<name>.py."""
    (script,) = {ROOT / "scripts" / f"train_{name}.py", ROOT / "scripts" / f"{name}.py"} & set(
        (ROOT / "scripts").iterdir()
    )
    monkeypatch.setattr(sys, "argv", [script.name, *map(str, args)])
    runpy.run_path(str(script), run_name="__main__")


def test_from_a_folder_of_images_to_a_model_that_draws(folder, tmp_path, monkeypatch):
    for name, more in (
        ("vae", ()),
        ("clip", ()),
        ("unet", ("--vae", tmp_path / "vae" / "export", "--clip", tmp_path / "clip" / "export")),
    ):
        config, run_dir = small(name, tmp_path), tmp_path / name
        run(monkeypatch, name, "--config", config, "--run_dir", run_dir, "--train_data_dir", folder, *more)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 2]
        assert any(key.startswith("held_out") for key in rows[-1])
    base = tmp_path / "unet" / "export"
    pipe = ldm.load(base)
    assert pipe("picture", seed=0).images[0].size == (32, 32)

    def follow(script, name, *more):
        config, run_dir = small(name, tmp_path), tmp_path / name
        run(monkeypatch, script, "--config", config, "--run_dir", run_dir, "--train_data_dir", folder, *more)
        return run_dir / "export"

    student = ldm.load(follow("distil_unet", "student", "--model", base))
    assert student.resolve(ldm.Request()).num_inference_steps == 4
    vae = follow("vae", "upscaler_vae", "--set", "loss.crop=0")
    upscaler = ldm.load(follow("upscaler", "upscaler", "--vae", vae, "--base", base))
    assert upscaler("picture", image=pipe("picture", seed=0).images[0]).images[0].size == (64, 64)


def test_one_command_trains_all_parts_and_puts_them_together(folder, tmp_path, monkeypatch, capsys):
    ran = []

    class Trainer(contextlib.nullcontext):
        """What would be started, in this process, on a tiny model and a folder."""

        def __init__(self, command, env):
            script = next(i for i, word in enumerate(command) if word.endswith(".py"))
            name = Path(command[script]).stem.removeprefix("train_")
            _, config, *arguments = command[script + 1 :]
            assert Path(config).is_file()
            ran.append((name, dict(word.split("=") for word in arguments if "run.max_minutes" in word)))
            run(monkeypatch, name, "--config", small(name, tmp_path), "--train_data_dir", folder, *arguments)
            super().__init__(self)

        def wait(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Trainer)
    monkeypatch.chdir(tmp_path)  # where a user's relative paths are
    run(monkeypatch, "postcard", "--minutes", 100, "--run_dir", "all")
    assert [name for name, _ in ran] == ["vae", "clip", "unet", "vae"]
    assert sum(float(minutes["run.max_minutes"]) for _, minutes in ran) == pytest.approx(100)
    assert f"the model is in {Path('all', 'model')}" in capsys.readouterr().out
    parts = {part: tmp_path / "all" / part / "export" for part in ("vae", "decoder")}
    first, polished, model = (
        load_vae(path).state_dict() for path in (*parts.values(), tmp_path / "all" / "model" / "vae")
    )
    for name, value in model.items():
        assert torch.equal(value, polished[name].bfloat16().float())
        assert torch.equal(first[name], polished[name]) == name.startswith("encoder")

    ran.clear()
    old = tmp_path / "all" / "model"
    scheduler = old / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"beta_end": 0.013}
    scheduler.write_text(json.dumps(config))
    run(monkeypatch, "postcard", "--minutes", 9, "--run_dir", tmp_path / "next", "--init_from", old)
    assert [name for name, _ in ran] == ["vae", "unet", "vae"]
    pipe = ldm.load(tmp_path / "next" / "model")
    assert pipe.parts.scheduler["beta_end"] == 0.013  # a model goes on with the schedule that it has
    assert pipe("picture", seed=0).images[0].size == (32, 32)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_part_follows_one_that_was_stopped(monkeypatch, number):
    """The trainer, here one that saves for half a second and exits with 0, is waited for."""
    trainer = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(0)))\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "time.sleep(1.5)"
    )
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    assert postcard.run([sys.executable, "-c", trainer], dict(os.environ)) == 128 + number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--minutes", "0"], "--minutes must be above 0 (got 0)"),
        (["--minutes", "inf"], "--minutes must be above 0 (got inf)"),
        (["--minutes", "5", "--init_from", "nowhere"], "nowhere is no model folder"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_trained(tmp_path, monkeypatch, capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "postcard", "--run_dir", tmp_path / "x", *arguments)
    assert named in capsys.readouterr().err + str(stopped.value.code)
    assert not (tmp_path / "x").exists()


def test_the_recipes_are_of_the_embedded_model_s_shape():
    """So that `train_postcard.py --init_from weights/postcard` goes on from it."""
    recipes = {
        name: yaml.safe_load((ROOT / "configs" / f"postcard_{name}.yaml").read_text())["model"]
        for name in ("vae", "unet")
    }
    parts = load_parts(ROOT / "weights" / "postcard", None)
    assert build(recipes["vae"]).to_config() == parts.vae.to_config()
    assert build(recipes["unet"]["unet"]).to_config() == parts.unet.to_config()
    assert recipes["unet"]["scheduler"].items() <= dict(parts.scheduler).items()
    assert Defaults(**recipes["unet"]["defaults"]) == parts.defaults


def test_parts_that_do_not_fit_are_named_before_pictures_are_made(folder, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch, "vae", "--config", small("vae", tmp_path), "--run_dir", tmp_path / "vae",
        *("--train_data_dir", folder, "--set", "model.latent_channels=20"),
    )  # fmt: skip
    run(monkeypatch, "clip", "--config", small("clip", tmp_path), "--run_dir", tmp_path / "clip",
        *("--train_data_dir", folder))  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "unet", "--config", small("unet", tmp_path), "--run_dir", tmp_path / "unet",
            *("--vae", tmp_path / "vae/export", "--clip", tmp_path / "clip/export"))  # fmt: skip
    assert stopped.value.code == 2
    assert "takes 16 channels, which does not go with the VAE's 20" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit) as stopped:
        run(
            monkeypatch,
            "vae",
            "--config",
            small("vae", tmp_path),
            "--run_dir",
            tmp_path / "x",
            "--train_data_dir",
            folder,
        )
    assert stopped.value.code == 2
    assert "training needs accelerate: pip install" in capsys.readouterr().err


def test_a_wrong_recipe_is_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "vae", "--run_dir", tmp_path / "x", "--set", "optimiser.rate=1")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()
