"""The whole command: stopped anywhere it goes on bit for bit, and held-out pictures stay what they are."""

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_finetune import QUICK, WORD, arguments, both, hashes, interrupted, result, run, write_pictures

import ldm
from ldm.dataset.findings import Example
from ldm.finetune.finetune import finetune
from ldm.finetune.pictures import split
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.train.state import newest_state

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 8)


@pytest.fixture(scope="module")
def of_class(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("class") / "sea", 2)


def accelerate_anew():
    """accelerate keeps the first training's settings for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# --- resuming --------------------------------------------------------------------------------------------

EVERY = {"validation_steps": 2, "logging_steps": 3, "checkpointing_steps": 3, "held_out": 0.2}
LORA = {"caption_dropout": 0.3, "random_flip": True, "snr_gamma": 5, "noise_offset": 0.1, "lora_dropout": 0.1}
FULL = {"mode": "full", "train_text_encoder": True, "text_encoder_lr": 1e-4, "ema_decay": 0.99}
PRIOR = {"class_prompt": "sea", "num_class_images": 2, "inpainting": True, "random_flip": True}


@posix
@pytest.mark.parametrize(
    ("family", "options", "calls"),
    [
        # With two forwards in a step, 1 stops a run within its first step, and 2 after it.
        pytest.param("sd1", LORA | {"max_train_steps": 3}, [2, 1], id="lora"),
        pytest.param("sd1", FULL, [1, 3], id="full"),
        pytest.param("sdxl", WORD | {"instance_prompt": "a <it>", "center_crop": False}, [3], id="word"),
        pytest.param("inpaint", PRIOR | {"max_train_steps": 1}, [1], id="prior"),
    ],
)
def test_stopped_in_any_forward_it_goes_on_bit_for_bit(
    families, data, of_class, tmp_path, monkeypatch, family, options, calls
):
    model = families(family)[0]
    if "class_prompt" in options:
        options |= {"class_data_dir": of_class}
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2} | EVERY | options
    assert run(model, data, tmp_path / "whole" / "run", **options) == 0
    forward, steps = FinetuneTask.forward, []
    for call in [*calls, 0]:
        accelerate_anew()
        monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
        assert run(model, data, tmp_path / "parts" / "run", **options) == 0
        steps.append(result(tmp_path / "parts" / "run")["state"])
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")


@posix
def test_two_processes_go_on_bit_for_bit_and_see_different_pictures(families, data, tmp_path):
    options = LORA | EVERY | {"gradient_accumulation_steps": 2, "max_train_steps": 3}
    argv = arguments(families("sd1")[0], data, tmp_path / "whole" / "run", **options)
    assert both(tmp_path / "whole", argv) == [0, 0], (tmp_path / "whole" / "output-0.txt").read_text()
    argv = arguments(families("sd1")[0], data, tmp_path / "parts" / "run", **options)
    assert both(tmp_path / "parts", argv, (0, 3)) == [0, 0]  # SIGTERM comes to one of them
    assert result(tmp_path / "parts" / "run")["state"] == "state-00000001"
    assert both(tmp_path / "parts", argv) == [0, 0]
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")

    lines = [(tmp_path / "whole" / f"output-{rank}.names").read_text().splitlines() for rank in (0, 1)]
    numbers = [[int(line.split()[0]) for line in own] for own in lines]
    assert numbers == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    shown = [line.split()[1] for line in lines[0] + lines[1] if int(line.split()[0]) < 7]
    assert len(shown) == len(set(shown)) == 7  # an epoch, by both together
    said = [(tmp_path / "whole" / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    assert "report: " in said[0]
    assert "pictures" not in said[1]


# --- held out --------------------------------------------------------------------------------------------


def examples(count, copies=0):
    made = [Example(Path(f"{i}.png"), f"number {i}", (64, 64), f"{i:064x}", 1 + i % 3) for i in range(count)]
    return made + [replace(each, path=Path(f"copy-{each.path}"), caption="copy") for each in made[:copies]]


def test_a_split_follows_from_the_pictures_alone():
    made = examples(30)
    trained, held_out = split(made, 0.2, seed=1)
    assert (len(trained), len(held_out)) == (24, 6)
    assert [each.digest for each in trained + held_out] != [each.digest for each in made]
    shuffled = random.Random(0).sample(made, 30)
    assert set(split(shuffled, 0.2, seed=1)[1]) == set(held_out)
    moved = [replace(each, path=Path("elsewhere") / each.path, caption="new") for each in made]
    assert {each.digest for each in split(moved, 0.2, seed=1)[1]} == {each.digest for each in held_out}
    assert set(split(made, 0.2, seed=2)[1]) != set(held_out)
    assert {each.repeats for each in held_out} == {1}
    assert [each for each in made if each in trained] == trained  # whole, in their order


def test_copies_stay_together():
    trained, held_out = split(examples(10, copies=10), 0.3)
    assert not {each.digest for each in trained} & {each.digest for each in held_out}
    assert len(held_out) == 6


@pytest.mark.parametrize(
    ("count", "share", "number"), [(100, 0.29, 29), (50, 0.58, 29), (100, 0.57, 57), (9, 0.1, 0)]
)
def test_a_share_is_what_it_says_where_floats_are_just_below(count, share, number):
    assert len(split(examples(count), share)[1]) == number


@pytest.mark.parametrize("share", [0.1, 0.37])
def test_a_picture_that_is_added_moves_at_most_one_other(share):
    made = examples(40)
    before = {each.digest for each in split(made[:5], share)[1]}
    for count in range(6, 41):
        now = {each.digest for each in split(made[:count], share)[1]}
        assert len((now ^ before) - {made[count - 1].digest}) <= 1
        before = now


def test_a_share_of_few_pictures_may_be_none():
    assert split(examples(9), 0.1) == (examples(9), [])
    assert split(examples(9), 0.0)[1] == []


def recipe(model, data, output, **options) -> FinetuneRecipe:
    given = {"model": str(model), "train_data_dir": data, "output_dir": output, **QUICK, **options}
    return FinetuneRecipe.model_validate(given)


@pytest.fixture
def made(families, data, tmp_path, monkeypatch):
    """A factory: the task that a recipe trains, before its first step."""
    import ldm.finetune.finetune as module

    tasks = []
    monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.eval()))
    monkeypatch.setattr(module, "_report", lambda *_: None)

    def make(family="sd1", **options):
        accelerate_anew()
        finetune(recipe(families(family)[0], data, tmp_path / "run", **options))
        return tasks[-1]

    return make


@torch.no_grad()
def held_out_loss(task):
    return task.evaluate()["held_out_loss"]


def test_held_out_loss_does_not_depend_on_how_is_trained(made, of_class):
    plain = held_out_loss(made(held_out=0.3))
    assert held_out_loss(made(held_out=0.3)) == plain
    for options in (
        {"train_batch_size": 3, "center_crop": False, "random_flip": True, "caption_dropout": 1.0}
        | {"snr_gamma": 5, "noise_offset": 0.2, "input_perturbation": 0.1, "loss_type": "huber"},
        {"train_batch_size": 8}
        | {"min_timestep": 900, "multires_noise_discount": 0.5, "lora_dropout": 0.5, "rank": 2},
        {"mode": "full", "train_text_encoder": True, "shuffle_tags": True}
        | {"class_prompt": "sea", "class_data_dir": of_class, "num_class_images": 2},
    ):
        assert held_out_loss(made(held_out=0.3, **options)) == pytest.approx(plain, rel=1e-5), options
    assert held_out_loss(made(held_out=0.3, seed=1)) != pytest.approx(plain, rel=1e-3)  # other pictures


def test_held_out_loss_of_inpainting_has_the_same_masks_in_any_batch(made):
    losses = [
        held_out_loss(made("inpaint", inpainting=True, held_out=0.3, train_batch_size=n)) for n in (1, 8)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_held_out_loss_is_of_the_eight_noise_levels(made, monkeypatch):
    task, seen = made(held_out=0.2), []
    predict = FinetuneTask._predict
    monkeypatch.setattr(
        FinetuneTask, "_predict", lambda task, batch: seen.append(batch) or predict(task, batch)
    )
    held_out_loss(task)
    (row,) = task.splits.held_out
    assert torch.cat([batch["t"] for batch in seen]).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert row.caption == row.example.caption
    assert row.example.digest not in {each.digest for each in task.splits.train.examples}


# --- what is said and left -------------------------------------------------------------------------------


def test_a_dry_run_tells_the_plan_and_writes_nothing(families, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = families("sd1")[0].parent
    before = hashes(root), hashes(data.parent), hashes(tmp_path)
    assert (
        run(
            families("sd1")[0],
            data,
            Path("run"),
            dry_run=True,
            class_prompt="sea",
            held_out=0.3,
            max_train_steps=None,
            num_train_epochs=7,
            train_batch_size=2,
        )
        == 0
    )
    assert (hashes(root), hashes(data.parent), hashes(tmp_path)) == before
    said = capsys.readouterr().out
    assert "8 pictures to train on" in said
    assert re.search(r"trains: lora, [\d,]+ parameters, computed in float32 on cpu", said)
    assert "pictures: 6 to train on, 2 held out; trained as" in said
    assert "28 steps of 2 pictures: each 9 times" in said
    assert "output: run" in said


def test_epochs_become_steps(made):
    """7 pictures of three shapes in batches of 2 are 4 or 5 batches, and two of them a step."""
    task = made(max_train_steps=None, num_train_epochs=7, train_batch_size=2, gradient_accumulation_steps=2)
    batches = len(task.splits.train)
    assert task.recipe.max_train_steps == 7 * -(-batches // 2)


def test_the_command_tells_how_it_goes_and_what_came_of_it(families, data, tmp_path, capsys):
    assert run(families("sd1")[0], data, tmp_path / "run", held_out=0.2) == 0
    said = capsys.readouterr().out
    assert "latents: 8, 8 of them made now" in said
    assert "captions: 9, 9 of them made now" in said  # and the empty one
    assert f"report: {tmp_path / 'run' / 'report.html'}" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "txt2img --lora" in page
    assert run(families("sd1")[0], data, tmp_path / "run", held_out=0.2) == 0  # it has ended: nothing is made
    again = capsys.readouterr().out
    assert "latents: 8, 0 of them made now" in again
    assert "loss" not in again.partition("going on from")[2].partition("report")[0]


def test_a_folder_that_has_changed_is_gone_on_with_by_force_only(families, tmp_path, capsys):
    data = write_pictures(tmp_path / "data")
    assert run(families("sd1")[0], data, tmp_path / "run", max_train_steps=1) == 0
    (data / "0.txt").write_text("another caption")
    accelerate_anew()
    assert run(families("sd1")[0], data, tmp_path / "run", max_train_steps=2) == 2
    assert "another recipe: pictures 6 " in capsys.readouterr().err
    accelerate_anew()
    assert run(families("sd1")[0], data, tmp_path / "run", max_train_steps=2, force=True) == 0
    assert "pictures 6 " in capsys.readouterr().out.partition("the recipe has changed since")[2]


def test_captions_in_another_column(families, tmp_path, capsys):
    data = write_pictures(tmp_path / "data", 2)
    for path in data.glob("*.txt"):
        path.unlink()
    rows = [{"file_name": path.name, "prompt": f"boat {path.stem}"} for path in sorted(data.glob("*.png"))]
    (data / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {"dry_run": True, "held_out": 0}
    assert run(families("sd1")[0], data, tmp_path / "run", caption_column="prompt", **options) == 0
    assert "captions: 2 from metadata.jsonl" in capsys.readouterr().out
    assert run(families("sd1")[0], data, tmp_path / "run", **options) == 2
    assert "no column text, but file_name, prompt" in capsys.readouterr().out


def test_another_size_is_another_run(families, data, tmp_path, capsys):
    assert run(families("sd1")[0], data, tmp_path / "run", max_train_steps=1, resolution=64) == 0
    before = result(tmp_path / "run")
    accelerate_anew()
    assert run(families("sd1")[0], data, tmp_path / "run", max_train_steps=2, resolution=72) == 2
    assert "another recipe: resolution 64 -> 72;" in capsys.readouterr().err
    assert result(tmp_path / "run") == before


# --- what comes out, and when there is nothing left to do -------------------------------------------------


def test_a_full_model_comes_out_as_precise_as_it_was_trained(families, data, tmp_path):
    """In bf16 nearly all that so small a learning rate changes would be rounded away."""
    stored = tmp_path / "stored"
    ldm.load(families("sd1")[0], device="cpu", dtype="fp32").save(stored, torch.bfloat16)
    assert run(stored, data, tmp_path / "run", mode="full", learning_rate=1e-6) == 0
    trained = load_file(newest_state(tmp_path / "run") / "weights.safetensors")
    export = tmp_path / "run" / "export"
    for name, value in load_file(export / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(value, trained[f"unet.{name}"]), name
    text = load_file(export / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in text.values() if value.is_floating_point()} == {torch.bfloat16}


def test_a_run_at_its_end_says_so_and_another_word_is_refused(families, data, tmp_path, capsys):
    model, word = families("sd1")[0], {"instance_prompt": "a <it>"} | WORD
    assert run(model, data, tmp_path / "run", **word) == 0
    before = result(tmp_path / "run")
    capsys.readouterr()
    accelerate_anew()
    assert run(model, data, tmp_path / "run", **word) == 0
    assert "at its end already, step 2: raise max_train_steps to go on" in capsys.readouterr().out
    accelerate_anew()
    other = word | {"placeholder_token": "<that>", "instance_prompt": "a <that>", "force": True}
    assert run(model, data, tmp_path / "run", **other) == 2
    assert "another recipe: placeholder_token <it> -> <that>;" in capsys.readouterr().err
    assert result(tmp_path / "run") == before


def test_no_more_than_64_pictures_are_held_out():
    pictures = [Example(Path(f"{i}.png"), "a", (8, 8), f"{i:064x}") for i in range(1000)]
    trained, held_out = split(pictures, 0.5)
    assert (len(trained), len(held_out)) == (936, 64)


def test_epochs_that_are_asked_for_go_before_the_steps_of_a_recipe(families, data, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("max_train_steps: 1000\n")
    options = {"config": tmp_path / "mine.yaml", "dry_run": True, "max_train_steps": None, "held_out": 0}
    assert run(families("sd1")[0], data, tmp_path / "run", num_train_epochs=2, **options) == 0
    assert "run: 16 steps of 1 pictures: each 2 times" in capsys.readouterr().out
