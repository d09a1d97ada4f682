"""The three trainers as a user runs them: on a folder of images, one after the other, to a picture."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import ldm

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
    recipe["data"] = {"size": 32, "held_out": 2, "cache": str(tmp_path / "cache")}
    recipe["optimiser"]["train_batch_size"] = 2
    recipe["run"] = {"max_train_steps": 2, "logging_steps": 1}
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / f"{name}.yaml"


def run(monkeypatch, name: str, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"train_{name}.py", *map(str, args)])
    runpy.run_path(str(ROOT / "scripts" / f"train_{name}.py"), run_name="__main__")


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
    pipe = ldm.load(tmp_path / "unet" / "export")
    assert pipe("picture", seed=0).images[0].size == (32, 32)


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
