"""`ldm finetune` where something is wrong: one line says what to do, nothing is lost, no picture touched."""

import os
import shutil
import sys

import pytest
import torch
from tiny_families import BY_4, made_once
from tiny_finetune import WORD, hashes, result, run, write_pictures
from tiny_training import largest_file

from ldm.finetune import finetune as module
from ldm.train.state import newest_state

MINE = WORD | {"instance_prompt": "red <it>"}


@pytest.fixture
def data(tmp_path):
    return write_pictures(tmp_path / "data", 6)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """Of small latents, as what is trained on has 64 x 64 pixels at least; not to be changed."""
    return made_once(tmp_path_factory.mktemp("models"), vae=BY_4)("sd1")[0]


@pytest.fixture(autouse=True)
def _accelerate_anew():
    anew()


def anew():
    """accelerate keeps the first training's settings for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def refused(data, tmp_path, capsys):
    """Run, and see it refused with a message that holds `said`; nothing is changed in `data`."""

    def check(model, said, folder=None, output=None, **options):
        anew()
        capsys.readouterr()
        before = hashes(data)
        code = run(model, folder or data, output or tmp_path / "run", **options)
        error = [
            line for line in capsys.readouterr().err.splitlines() if "warning: the run starts" not in line
        ]
        assert code == 2, error
        assert len(error) == 1, error
        assert said in error[0]
        assert "internal error" not in error[0]
        assert hashes(data) == before

    return check


# --- before it starts ------------------------------------------------------------------------------------


def test_folders_that_cannot_be_trained_on(refused, sd1, data, tmp_path, capsys):
    refused(sd1, "nowhere is not a folder", tmp_path / "nowhere")
    refused(sd1, "0.png is not a folder", data / "0.png")
    (tmp_path / "empty").mkdir()
    refused(sd1, "empty cannot be trained on as it is", tmp_path / "empty")
    shutil.copytree(data, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    refused(sd1, "cannot be trained on as it is", tmp_path / "bare")
    refused(sd1, "cannot be trained on as it is", tmp_path / "bare", missing_caption="skip")
    assert not (tmp_path / "run").exists()


def test_a_report_says_what_is_missing(sd1, data, tmp_path, capsys):
    (data / "3.txt").unlink()
    assert run(sd1, data, tmp_path / "run") == 2
    said = capsys.readouterr().out
    assert "3.png: it has no caption" in said
    assert "--missing_caption" in said


@pytest.mark.parametrize("option", ["output_dir", "cache_dir", "class_data_dir"])
@pytest.mark.parametrize("below", ["", "below"])
def test_nothing_is_ever_written_among_the_pictures(refused, sd1, data, option, below):
    place = data / below
    prompt = {"class_prompt": "sea"} if option == "class_data_dir" else {}
    refused(sd1, f"{option} {place} lies in the folder of pictures", **{option: place}, **prompt)
    link = data.parent / "link"
    link.symlink_to(data)
    refused(sd1, f"{option} {link / below} lies in the folder", **{option: link / below}, **prompt)


def test_what_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere", "nowhere: no such folder or file")
    refused(tmp_path / "empty", "model_index.json: cannot be read")
    (tmp_path / "text.safetensors").write_text("no model")
    refused(tmp_path / "text.safetensors", "text.safetensors")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "said", "options"),
    [
        ("refiner", "is an SDXL refiner: text-to-image and inpainting models can be fine-tuned", {}),
        ("lcm", "is an LCM, which is distilled", {}),
        ("upscaler", "is a model of kind upscale", {}),
        ("upscaler", "is a model of kind upscale", {"inpainting": True, "mode": "full"}),
        ("pix2pix", "is a model of kind pix2pix", {}),
        ("inpaint", "is an inpainting model: add --inpainting", {}),
        ("inpaint", "is an inpainting model", MINE),
        ("sd1", "a LoRA cannot teach a model to inpaint", {"inpainting": True}),
    ],
)
def test_models_that_cannot_be_trained_so(refused, families, tmp_path, family, said, options):
    refused(families(family)[0], said, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            WORD,
            "no caption contains <it>: write it in the captions, or give one to all pictures",
        ),
        (WORD | {"placeholder_token": "boat"}, "the model has 'boat' already: give a word that is new to it"),
        (MINE | {"initializer_token": "red boat"}, "that is 2 tokens and the word has 1; give it 2 vectors"),
        (MINE | {"placeholder_token": "a b", "instance_prompt": "a b"}, "give one without blanks"),
        ({"lora_targets": "to_x"}, "LoRA target 'to_x' is in no trained part"),
        ({"resolution": 100}, "resolution: Input should be a multiple of 8 (got '100')"),
        ({"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU: give bf16 or no"),
        ({"min_timestep": 1200}, "change min_timestep, max_timestep"),
        ({"resume_from_checkpoint": "state-7"}, "resume_from_checkpoint: state-7 is no folder"),
    ],
)
def test_options_that_do_not_fit(refused, sd1, tmp_path, options, said):
    refused(sd1, said, **options)
    assert newest_state(tmp_path / "run") is None


def test_tensorboard_that_is_not_installed(refused, sd1, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    refused(
        sd1,
        "report_to is tensorboard, which is not installed: pip install tensorboard",
        report_to="tensorboard",
    )


@pytest.mark.parametrize("package", ["accelerate", "peft"])
def test_a_package_that_is_not_installed_is_named(refused, sd1, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused(sd1, f"training needs {package}: pip install")


def test_an_output_that_is_a_file(refused, sd1, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(sd1, f"{tmp_path / 'file'}", output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- pictures that go ------------------------------------------------------------------------------------


def delete(monkeypatch, data, before):
    """Have a picture deleted just before or after the caches are filled."""
    fill = module._fill

    def filled(*args):
        if before:
            (data / "2.png").unlink()
        fill(*args)
        if not before:
            (data / "2.png").unlink()

    monkeypatch.setattr(module, "_fill", filled)


def test_a_picture_that_is_gone_before_it_is_read_is_named(sd1, data, tmp_path, monkeypatch, capsys):
    delete(monkeypatch, data, before=True)
    assert run(sd1, data, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert str(data / "2.png") in error
    assert error.count("\n") == 1


def test_a_picture_that_is_gone_after_the_caches_are_filled_is_not_missed(sd1, data, tmp_path, monkeypatch):
    assert run(sd1, data, tmp_path / "whole" / "run", max_train_steps=6) == 0
    anew()
    delete(monkeypatch, data, before=False)
    assert run(sd1, data, tmp_path / "without" / "run", max_train_steps=6) == 0
    assert result(tmp_path / "without" / "run") == result(tmp_path / "whole" / "run")


def test_a_picture_that_is_gone_while_training_is_named_with_the_state_to_go_on_from(
    sd1, data, tmp_path, monkeypatch, capsys
):
    """Random crops are read from the pictures each time."""
    options = {
        "center_crop": False,
        "max_train_steps": 12,
        "checkpointing_steps": 1,
    }
    delete(monkeypatch, data, before=False)
    assert run(sd1, data, tmp_path / "run", **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(data / "2.png") in error
    state = newest_state(tmp_path / "run")
    assert (f"the last good state is {state}" if state else "no state has been saved") in error


def test_a_loss_that_is_not_finite_names_the_pictures(refused, sd1, tmp_path):
    refused(sd1, "lower learning_rate", mode="full", learning_rate=1e30, max_train_steps=9)


def test_captions_without_the_word_are_counted(sd1, data, tmp_path, capsys):
    (data / "0.txt").write_text("a <it>")
    assert run(sd1, data, tmp_path / "run", dry_run=True, held_out=0, **WORD) == 0
    assert "captions do not contain <it>: they teach it nothing" in capsys.readouterr().err


# --- another run in the same folder ----------------------------------------------------------------------


def test_a_run_of_another_kind_is_refused_by_name_and_nothing_is_lost(refused, families, sd1, data, tmp_path):
    assert run(sd1, data, tmp_path / "run", rank=4) == 0
    before = result(tmp_path / "run")
    other = families("sd2_v")[0]
    for model, said, options in (
        (sd1, "rank 4 -> 8", {"rank": 8}),
        (sd1, "mode lora -> full", {"mode": "full"}),
        (sd1, "seed 0 -> 3", {"seed": 3}),
        (sd1, "train_batch_size 1 -> 2", {"train_batch_size": 2}),
        (other, f"model {sd1} -> {other}", {}),
    ):
        refused(model, said, **options)
    # What cannot be gone on with cannot be forced either, and the message says what to do.
    for model, options in (
        (sd1, {"rank": 8, "force": True}),
        (sd1, {"mode": "full", "force": True}),
        (sd1, {"use_dora": True}),
        (sd1, {"lora_targets": "to_k"}),
        (sd1, {"train_text_encoder": True}),
        (other, {"force": True}),
    ):
        refused(model, "choose another folder", **options)
    assert result(tmp_path / "run") == before
    anew()
    assert run(sd1, data, tmp_path / "run", rank=4, max_train_steps=3) == 0
    assert newest_state(tmp_path / "run").name == "state-00000003"


def test_force_goes_on_where_that_is_possible(sd1, data, tmp_path, capsys):
    assert run(sd1, data, tmp_path / "run") == 0
    anew()
    assert run(sd1, data, tmp_path / "run", seed=3, max_train_steps=3, force=True) == 0
    assert newest_state(tmp_path / "run").name == "state-00000003"
    assert (
        "the recipe has changed since state-00000002: max_train_steps 2 -> 3, seed 0 -> 3"
        in capsys.readouterr().out
    )


# --- the disk --------------------------------------------------------------------------------------------


def test_damaged_entries_of_the_cache_are_made_again(sd1, data, tmp_path):
    assert run(sd1, data, tmp_path / "a" / "run") == 0
    cache = tmp_path / "a" / "run" / "cache"
    entries = sorted(cache.rglob("*.safetensors"))
    before = {path: path.read_bytes() for path in entries}
    assert len(entries) == 6 + 7
    for i, path in enumerate(entries):
        raw = bytearray(before[path])
        raw[-1 - i] ^= 1  # of a value: still a number
        path.write_bytes([bytes(raw), raw[: len(raw) // 2], b"", b"\xff" * 40][i % 4])
    anew()
    assert run(sd1, data, tmp_path / "b" / "run", cache_dir=cache) == 0
    assert result(tmp_path / "b" / "run") == result(tmp_path / "a" / "run")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize(
    ("size", "said"), [(200, "cannot write to the cache"), (36_000, "no state has been saved")]
)
def test_a_full_disk_is_told_and_the_same_command_goes_on_when_there_is_room(
    refused, sd1, data, tmp_path, size, said
):
    with largest_file(size):
        refused(sd1, said)
    anew()
    assert run(sd1, data, tmp_path / "run") == 0
    anew()
    assert run(sd1, data, tmp_path / "whole" / "run") == 0
    assert result(tmp_path / "run") == result(tmp_path / "whole" / "run")
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_disk_that_fills_up_on_the_way_keeps_the_last_state(refused, sd1, data, tmp_path):
    options = {"mode": "full", "checkpointing_steps": 1}
    assert run(sd1, data, tmp_path / "run", max_train_steps=1, **options) == 0
    before = result(tmp_path / "run")
    with largest_file(300_000):
        refused(sd1, "the last good state is", max_train_steps=2, **options)
    after = result(tmp_path / "run")
    assert (after["tensors"], after["export"]) == (before["tensors"], before["export"])
    anew()
    assert run(sd1, data, tmp_path / "run", max_train_steps=2, **options) == 0
    assert torch.isfinite(
        torch.tensor([row["loss"] for row in result(tmp_path / "run")["log"] if "loss" in row])
    ).all()
