"""States on disk: what is kept, what is passed over, what is refused; the lock; a full disk."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_training import Line, largest_file, tiny_recipe

from ldm.errors import UserError
from ldm.train import lock, progress
from ldm.train import state as states
from ldm.train.changes import digest
from ldm.train.loop import train
from ldm.train.state import Position, State, damage, find_state, load_state, newest_state, save_state

RECIPE = {"run.seed": 1}


def save(run_dir: Path, state: State, *steps: int, keep: int = 1) -> Path:
    for step in steps:
        folder = save_state(run_dir, Position(step, step * 4, 1.5), state, RECIPE, {"window": None}, keep)
    return folder


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


# --- written and read ------------------------------------------------------------------------------------


def test_a_state_is_safetensors_and_json_and_comes_back_bit_for_bit(tmp_path, state):
    folder = save(tmp_path, state, 3)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [name for name in names(folder) if name != "manifest.json"]
    assert manifest["recipe"] == digest(RECIPE)

    blank = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2))
    blank.to(memory_format=torch.channels_last)
    other = State(
        dict(blank.named_parameters()),
        {name: torch.zeros_like(p) for name, p in blank.named_parameters()},
        torch.optim.AdamW(blank.parameters()),
    )
    assert load_state(folder, other) == (Position(3, 12, 1.5), {"window": None})
    for ours, theirs in ((state.weights, other.weights), (state.ema, other.ema)):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    before, after = (each.optimiser.state_dict()["state"] for each in (state, other))
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])
    moment = other.optimiser.state_dict()["state"][0]["exp_avg"]
    assert moment.stride() == next(blank.parameters()).stride()  # or the fused step would be slow


def test_plain_numbers_of_an_optimiser_are_kept(tmp_path, state):
    """As AdamW of bitsandbytes has them."""
    for p in state.optimiser.state:
        state.optimiser.state[p]["step"] = 7
    folder = save(tmp_path, state, 3)
    for p in state.optimiser.state:
        state.optimiser.state[p]["step"] = 0
    load_state(folder, state)
    assert [entry["step"] for entry in state.optimiser.state.values()] == [7] * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("1.bias"), "1.bias is in it, but not in the model"),
        (lambda w: w.update(lora=torch.zeros(2)), "lora is in the model, but not in it"),
        (lambda w: w.update({"1.bias": torch.zeros(5)}), r"1.bias is \[2\], and \[5\] in the model"),
    ],
)
def test_the_state_of_another_model_is_refused_by_the_tensors_name(tmp_path, state, change, said):
    folder, weights = save(tmp_path, state, 3), dict(state.weights)
    change(weights)
    with pytest.raises(UserError, match=said):
        load_state(folder, State(weights, state.ema, state.optimiser))


def test_what_is_frozen_is_not_in_the_state(tmp_path):
    task = Line()
    task.layer[0].requires_grad_(False)
    task.register_buffer("mean", torch.ones(2))
    train(task, tiny_recipe(2), tmp_path)
    from safetensors.torch import load_file

    saved = load_file(newest_state(tmp_path) / "weights.safetensors")
    assert sorted(saved) == ["layer.3.bias", "layer.3.weight", "mean"]


# --- which are kept --------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_an_older_one_goes_only_after_the_new_one_is_whole(
    tmp_path, state, monkeypatch
):
    save(tmp_path, state, 10, 20, 30, keep=2)
    assert names(tmp_path) == ["state-00000020", "state-00000030"]

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "_sync", fails)
    with pytest.raises(UserError, match=r"cannot write to .*state-00000040: No space left on device"):
        save(tmp_path, state, 40)
    assert names(tmp_path) == ["state-00000020", "state-00000030"]
    assert damage(tmp_path / "state-00000030") is None


def _cut_short(folder, **_):
    (folder / "weights.safetensors").unlink(missing_ok=True)


def test_a_removal_that_is_cut_short_leaves_no_state(tmp_path, state, monkeypatch):
    save(tmp_path, state, 10)
    with monkeypatch.context() as patched:
        patched.setattr(states.shutil, "rmtree", _cut_short)
        save(tmp_path, state, 20)
    assert len(names(tmp_path)) == 2
    assert find_state(tmp_path) == tmp_path / "state-00000020"
    assert names(tmp_path) == ["state-00000020"]


# --- which is gone on from -------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["weights", "ema", "optimiser"])
@pytest.mark.parametrize(
    ("how", "said"), [(cut, "is cut short"), (flip, "is changed"), (Path.unlink, "is missing")]
)
def test_a_damaged_state_is_passed_over_and_said(tmp_path, state, file, how, said, capsys):
    save(tmp_path, state, 10, 20, keep=2)
    how(tmp_path / "state-00000020" / f"{file}.safetensors")
    assert find_state(tmp_path) == tmp_path / "state-00000010"
    assert capsys.readouterr().out == f"passed over state-00000020: {file}.safetensors {said}" + (
        " or changed\n" if how is cut else "\n"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": {"weights.safetensors": 3}}'])
def test_a_damaged_manifest(tmp_path, state, content, capsys):
    save(tmp_path, state, 10, 20, keep=2)
    (tmp_path / "state-00000020" / "manifest.json").write_text(content)
    assert find_state(tmp_path) == tmp_path / "state-00000010"
    assert re.fullmatch(
        r"passed over state-00000020: its manifest is (missing or )?damaged\n", capsys.readouterr().out
    )


def test_what_a_killed_run_was_writing_is_cleared_and_said(tmp_path, state, capsys):
    save(tmp_path, state, 10)
    shutil.copytree(tmp_path / "state-00000010", tmp_path / ".state-00000020-k2j4")
    assert find_state(tmp_path) == tmp_path / "state-00000010"
    assert capsys.readouterr().out == "passed over state-00000020: unfinished\n"
    assert names(tmp_path) == ["state-00000010"]


def test_where_none_is_whole_nothing_starts_anew_unasked(tmp_path, state, capsys):
    flip(save(tmp_path, state, 10) / "run.json")
    with pytest.raises(UserError, match=r"no state is whole \(state-00000010: run.json is changed\)"):
        find_state(tmp_path)
    assert find_state(tmp_path, force=True) is None
    assert find_state(tmp_path / "empty") is None


def test_no_and_an_older_state_do_not_leave_work_behind_unasked(tmp_path, state):
    save(tmp_path, state, 10, 20, keep=2)
    for resume in ("no", "state-00000010", str(tmp_path / "state-00000010")):
        with pytest.raises(UserError, match=r"holds state-00000020: leave out resume_from_checkpoint="):
            find_state(tmp_path, resume)
    assert find_state(tmp_path, "no", force=True) is None
    older = tmp_path / "state-00000010"
    assert find_state(tmp_path, "state-00000010", force=True) == older
    assert find_state(tmp_path, str(tmp_path / "state-00000020")) == tmp_path / "state-00000020"
    save(tmp_path, state, 15, keep=2)  # gone on from step 10: what was left behind goes
    assert names(tmp_path) == ["state-00000010", "state-00000015"]
    assert find_state(tmp_path / "new", "no") is None
    assert find_state(tmp_path / "new", str(older)) == older


def test_a_state_that_is_asked_for_must_be_whole(tmp_path, state):
    with pytest.raises(UserError, match="state-00000010 is no folder, nor is"):
        find_state(tmp_path, "state-00000010")
    flip(save(tmp_path, state, 10) / "recipe.json")
    with pytest.raises(UserError, match=r"state-00000010 cannot be gone on from: recipe.json is changed"):
        find_state(tmp_path, "state-00000010")


def test_a_run_goes_on_from_another_folders_state(tmp_path):
    train(Line(interrupt=11), tiny_recipe(20), tmp_path / "first")
    train(Line(), tiny_recipe(20), tmp_path / "whole")
    there = str(tmp_path / "first" / newest_state(tmp_path / "first").name)
    train(Line(), tiny_recipe(20, resume_from_checkpoint=there), tmp_path / "second")
    manifests = [
        json.loads((tmp_path / name / "state-00000020" / "manifest.json").read_text())["files"]
        for name in ("whole", "second")
    ]
    for name in ("weights", "ema", "optimiser"):
        assert manifests[0][f"{name}.safetensors"] == manifests[1][f"{name}.safetensors"]


# --- the lock --------------------------------------------------------------------------------------------


def test_one_run_in_a_folder_and_the_second_is_told_who_holds_it(tmp_path):
    with lock.only_run(tmp_path):
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on \S+ since 20"):
            train(Line(), tiny_recipe(2), tmp_path)
        assert not list(tmp_path.glob("state-*"))
    train(Line(), tiny_recipe(2), tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        train(Line(), tiny_recipe(2), tmp_path / "file")


# --- a full disk -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KB, on which three states of `Wide` do not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class Wide(Line):
    """Its state takes 115 KB."""

    def __init__(self, **options):
        super().__init__(**options)
        self.ballast = torch.nn.Parameter(torch.zeros(7000))

    def forward(self, batch):
        loss, extra = super().forward(batch)
        return loss + 0 * self.ballast.sum(), extra

    def export(self, folder):
        pass


def test_a_disk_that_fills_up_while_saving_leaves_the_last_state_whole(small_disk):
    run_dir = small_disk / "run"
    train(Wide(), tiny_recipe(10), run_dir)
    (small_disk / "ballast").write_bytes(bytes(200_000))
    with pytest.raises(UserError) as full:
        train(Wide(), tiny_recipe(20, logging_steps=1), run_dir)
    assert re.search(
        r"state-00000020: .*No space left on device.*; the last good state is .*-00000010", str(full.value)
    )
    assert "\n" not in str(full.value)
    assert [name for name in names(run_dir) if name != ".lock"] == ["metrics.jsonl", "state-00000010"]
    assert damage(run_dir / "state-00000010") is None
    (small_disk / "ballast").unlink()
    train(Wide(), tiny_recipe(20, logging_steps=1), run_dir)
    assert names(run_dir)[-1] == "state-00000020"


def test_files_over_the_limit_of_their_size(tmp_path):
    """Where file systems cannot be mounted: the same, by another way."""
    train(Wide(), tiny_recipe(10), tmp_path)
    with (
        largest_file(20_000),
        pytest.raises(UserError, match=r"-00000020: .*File too large.*; the last good state is .*-00000010$"),
    ):
        train(Wide(), tiny_recipe(20), tmp_path)
    assert not list(tmp_path.glob(".state-*"))
    assert damage(tmp_path / "state-00000010") is None


def test_a_row_of_the_log_is_written_whole_or_not_at_all(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n')
    with largest_file(40), pytest.raises(OSError, match="too large"):
        progress._append(log, "x" * 100)
    assert log.read_text() == '{"step": 1}\n'
