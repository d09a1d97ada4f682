"""Several resolutions in a run: each picture at each of them, as runs of one resolution show it."""

import os
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from tiny_finetune import arguments, contents, interrupted, result, run, write_pictures

from ldm.cli import main
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
BOTH = "64,96"
# Of the buckets of 64 and of 96 pixels, in units of 8, that whose ratio is nearest: (height, width).
SIZES = {(64, 64): [(64, 64), (96, 96)], (64, 96): [(48, 80), (80, 112)], (80, 56): [(72, 56), (112, 80)]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 8)


def accelerate_anew():
    """accelerate keeps the first training's settings for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def made(families, data, tmp_path, monkeypatch):
    """A factory: the task that a recipe trains, before its first step."""
    import ldm.finetune.finetune as module

    tasks = []
    monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.eval()))
    monkeypatch.setattr(module, "_report", lambda *_: None)

    def make(family, name, **options):
        accelerate_anew()
        given = {"model": str(families(family)[0]), "train_data_dir": data, "output_dir": tmp_path / name}
        finetune(FinetuneRecipe.model_validate(given | {"mixed_precision": "no"} | options))
        return tasks[-1]

    return make


def test_each_picture_is_shown_at_each_size_and_sdxl_is_told_which(made, data):
    task = made("sdxl", "run", resolution=BOTH, held_out=0, num_train_epochs=3, train_batch_size=1)
    assert task.recipe.max_train_steps == 3 * 2 * 8
    for epoch in range(3):
        shown = Counter()
        for number in range(epoch * 16, epoch * 16 + 16):
            batch = task.batch(torch.Generator().manual_seed(number), 1, number)
            (example,) = (task.examples[int(i)] for i in batch["example"])
            h, w, top, left, height, width = (int(each) for each in batch["time_ids"][0])
            shown[example.path.name, (height, width)] += 1
            # The picture covers its bucket, and what is over is cut off on both sides alike.
            scale = max(height / h, width / w)
            assert (h, w) == example.size
            assert abs(top - (h * scale - height) / 2) <= 1
            assert abs(left - (w * scale - width) / 2) <= 1
            assert tuple(4 * side for side in batch["x0"].shape[2:]) == (height, width)
        assert shown == {
            (each.path.name, size): 1 for each in task.splits.train.examples for size in SIZES[each.size]
        }


def test_batches_are_of_one_size_and_fill_up_within_it(made):
    task = made("sd1", "run", resolution=BOTH, held_out=0, train_batch_size=2)
    sizes = Counter()
    for number in range(len(task.splits.train)):
        rows = task.splits.train.at(number)
        (size,) = {row.crop.size for row in rows}
        sizes[size] += len({row.example.digest for row in rows})
    assert sizes == {(64, 64): 4, (96, 96): 4, (48, 80): 4, (80, 112): 4, (72, 56): 2, (112, 80): 2}


def test_latents_and_held_out_loss_are_those_of_runs_of_one_resolution(made, tmp_path):
    """The same entries of the cache, to the bit, and no other."""
    tasks = [
        made("sd1", f"of {each}", resolution=each, held_out=0.3, random_flip=True) for each in (64, 96, BOTH)
    ]
    alone, other, both = (contents(tmp_path / f"of {each}/cache/latents") for each in (64, 96, BOTH))
    entries = {name for name in both if name.endswith(".safetensors")}
    assert len(entries) == 2 * (2 * 6 + 2)
    assert both == alone | other
    with torch.no_grad():
        losses = [task.evaluate()["held_out_loss"] for task in tasks]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert tasks[2].splits.counts == (6, 2)


@posix
def test_stopped_it_goes_on_bit_for_bit_and_draws_at_the_largest(families, data, tmp_path, monkeypatch):
    options = {"resolution": BOTH, "train_batch_size": 2, "random_flip": True, "max_train_steps": 4}
    assert run(families("sd1")[0], data, tmp_path / "whole" / "run", **options) == 0
    forward = FinetuneTask.forward
    for call in (3, 0):
        accelerate_anew()
        monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
        assert run(families("sd1")[0], data, tmp_path / "parts" / "run", **options) == 0
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")
    report = (tmp_path / "whole" / "run" / "report.html").read_text()
    assert "64 96" in report
    drawn = result(tmp_path / "whole" / "run")["grids"]
    accelerate_anew()
    assert run(families("sd1")[0], data, tmp_path / "96", max_train_steps=4, resolution=96) == 0
    assert drawn["00000000.png"] == result(tmp_path / "96")["grids"]["00000000.png"]  # before any step


def test_what_precompute_makes_of_shards_is_all_that_training_reads(families, data, tmp_path, capsys):
    import tarfile

    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as tar:
        for path in sorted(data.iterdir()):
            tar.add(path, path.name)
    options = {"resolution": BOTH, "cache_dir": tmp_path / "cache", "num_validation_images": 0}
    argv = arguments(families("sd1")[0], shards, tmp_path / "run", **options)
    assert main(["precompute", *argv[1:]]) == 0
    assert "latents: 16, 16 of them made now" in capsys.readouterr().out
    accelerate_anew()
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "latents: 16, 0 of them made now" in said
    assert "each 0 times at each resolution" in said  # 2 steps of one picture, of 8 at two sizes
    accelerate_anew()
    options["cache_dir"] = tmp_path / "other"
    assert run(families("sd1")[0], data, tmp_path / "folder", **options) == 0
    ours, theirs = (
        load_file(tmp_path / name / "export/pytorch_lora_weights.safetensors") for name in ("run", "folder")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
