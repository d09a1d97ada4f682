"""Masked loss: a step against numpy, nothing learnt outside of masks, and stopped against not stopped."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_finetune import QUICK, interrupted, result, run, write_pictures

from ldm.errors import UserError
from ldm.finetune import finetune as module
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")


@pytest.fixture
def data(tmp_path):
    """Pictures of noise of three shapes, and masks of their left half."""
    folder = write_pictures(tmp_path / "data", 6)
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(path.with_suffix(".mask.png"))
    return folder


@pytest.fixture
def task_of(families, data, tmp_path, monkeypatch):
    """A factory: the task of a fine-tuning that has not begun."""

    def make(**options):
        tasks = []
        monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.train()))
        monkeypatch.setattr(module, "_report", lambda *_: None)
        given = {"model": str(families("sd1")[0]), "train_data_dir": data, "output_dir": tmp_path / "run"}
        finetune(FinetuneRecipe.model_validate(QUICK | given | {"train_batch_size": 2} | options))
        return tasks[0]

    return make


def left_half(sample, downscale, unmasked):
    """Of a crop at the centre: in the mirrored picture the left half is the right one."""
    height, width = sample.crop.size
    middle = sample.crop.resized[1] / 2 - sample.crop.left
    counted = np.clip(middle - np.arange(width), 0, 1)  # how much of each pixel lies before the middle
    if sample.crop.flipped:
        counted = np.clip(np.arange(1, width + 1) - middle, 0, 1)
    row = counted.reshape(-1, downscale).mean(1)
    return unmasked + (1 - unmasked) * np.tile(row, (height // downscale, 1))


@pytest.mark.parametrize("options", [{}, {"loss_type": "huber", "snr_gamma": 5.0, "unmasked_weight": 0.25}])
def test_a_step_is_that_of_numpy(task_of, options):
    task = task_of(masked_loss=True, random_flip=True, **options)
    unmasked, flipped = options.get("unmasked_weight", 0.0), set()
    for number in range(4):
        samples = task.splits.train.at(number)
        batch = task.batch(torch.Generator().manual_seed(number), 2, number)
        with torch.no_grad():
            loss, _ = task(batch)
            error = (task._predict(batch) - batch["noise"]).double().numpy()
        squares = error**2
        if options:
            squares = 2 * 0.1 * (np.sqrt(squares + 0.1**2) - 0.1)
        weights = np.stack([left_half(sample, task.parts.vae.downscale, unmasked) for sample in samples])
        losses = (squares.mean(1) * weights).mean((1, 2))
        if options:
            a = task.schedule.alphas_cumprod[batch["t"]].numpy()
            losses = losses * np.minimum(a / (1 - a), 5) / (a / (1 - a))
        assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)
        flipped |= {sample.crop.flipped for sample in samples}
    assert flipped == {False, True}


def test_outside_of_the_mask_nothing_is_learnt(task_of):
    """The target of the right half does not matter; that of the left one does."""
    task = task_of(masked_loss=True)
    batch = task.batch(torch.Generator().manual_seed(0), 2, 0)
    half = batch["x0"].shape[-1] // 2
    gradients = []
    for change in (None, slice(half + 1, None), slice(0, half - 1)):
        told = {**batch, "noise": batch["noise"].clone()}
        if change is not None:
            told["noise"][..., change] += 1
        task.zero_grad()
        task(told)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_held_out_pictures_count_where_masks_do(task_of):
    task = task_of(masked_loss=True, held_out=0.4)
    task.eval()
    with torch.no_grad():
        masked = task.evaluate()["held_out_loss"]
        whole = task_of(held_out=0.4).eval().evaluate()["held_out_loss"]
    assert 0.2 * whole < masked < 0.8 * whole


@posix
def test_stopped_it_goes_on_bit_for_bit(families, data, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    model, forward = families("sd1")[0], FinetuneTask.forward
    options = {"masked_loss": True, "unmasked_weight": 0.1, "random_flip": True, "center_crop": False}
    options |= {
        "class_prompt": "sea",
        "num_class_images": 2,
        "class_data_dir": tmp_path / "sea",
        "held_out": 0.2,
    }
    options |= {"max_train_steps": 3, "validation_steps": 2}
    write_pictures(tmp_path / "sea", 2)
    for name, calls in (("whole", [0]), ("parts", [2, 0])):
        for call in calls:
            AcceleratorState._reset_state(reset_partial_state=True)
            monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
            assert run(model, data, tmp_path / name / "run", **options) == 0
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")


def test_other_masks_are_another_run(families, data, tmp_path, capsys):
    model = families("sd1")[0]
    options = {"masked_loss": True, "max_train_steps": 1, "num_validation_images": 0}
    assert run(model, data, tmp_path / "run", **options) == 0
    Image.new("L", (64, 64), 7).save(data / "0.mask.png")
    assert run(model, data, tmp_path / "run", **options | {"max_train_steps": 2}) == 2
    assert "another recipe: mask_files 6 " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha_mask": True, "mask_data_dir": "masks"}, "alpha_mask and mask_data_dir: choose one"),
        ({"unmasked_weight": 0.1}, "unmasked_weight needs masked_loss"),
        (
            {"masked_loss": True, "variance": "hybrid", "mode": "full"},
            "masked_loss does not go with variance",
        ),
    ],
)
def test_what_does_not_go_together_is_told(options, said):
    with pytest.raises(ValueError, match=said):
        FinetuneRecipe.model_validate({"train_data_dir": "data", "output_dir": "run"} | options)


def test_masks_that_lie_among_the_pictures_are_refused(task_of, data):
    (data / "masks").mkdir()
    with pytest.raises(UserError, match=r"mask_data_dir .* lies in the folder of pictures"):
        task_of(mask_data_dir=data / "masks")
