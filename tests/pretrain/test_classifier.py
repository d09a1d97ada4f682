"""Training a classifier of noisy latents: its loss, its figures, its script."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_classifier import tiny_classifier
from tiny_tasks import tiny_pictures, tiny_vae

from ldm.checkpoint import embedded, load_folder
from ldm.checkpoint.beside.classifier import read_classifier
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.postcards.vocabulary import KINDS
from ldm.pretrain.classifier import ClassifierTask, kinds_of

ROOT = Path(__file__).parents[2]
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


def separable(count=60):
    """Latents whose class is the channel that is bright."""
    classes = torch.arange(count) % 3
    latents = 0.3 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    latents[torch.arange(count), classes] += 1.5
    return latents.half(), classes


@pytest.fixture
def task():
    return ClassifierTask(
        tiny_classifier(tiny_vae()), Schedule.from_config(SCHEDULE), separable(), separable(30)
    )


def test_the_loss_is_cross_entropy_at_the_schedule_s_levels(task):
    batch = task.batch(torch.Generator().manual_seed(3), 40)
    again = task.batch(torch.Generator().manual_seed(3), 40)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    levels = task.levels.sigma
    assert all((levels == each).any() for each in batch["sigma"])
    loss, extra = task(batch)
    logits = task.classifier(batch["x"], batch["sigma"])
    assert loss.item() == pytest.approx(F.cross_entropy(logits, batch["classes"]).item(), rel=1e-5)
    assert extra["accuracy"].item() == pytest.approx((logits.argmax(1) == batch["classes"]).float().mean())


def test_states_are_latents_with_noise_of_their_level_and_pure_noise_is_finite(task):
    latents, classes = task.train_set
    t = torch.tensor([0, 500, 999])
    batch = task._batch(latents[:3], classes[:3], t, torch.Generator().manual_seed(0))
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    want = latents[:3].float() + task.levels.sigma[t][:, None, None, None] * noise
    assert torch.equal(batch["x"], want)
    assert float(batch["sigma"][2]) == pytest.approx(1e10)
    loss, _ = task(batch)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters())


def test_it_learns_and_knows_nothing_at_pure_noise(task):
    optimiser = torch.optim.Adam(task.parameters(), lr=5e-3)
    for step in range(60):
        loss, _ = task(task.batch(torch.Generator().manual_seed(step), 32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        figures = task.evaluate()
    accuracy = [value for name, value in figures.items() if name.startswith("accuracy")]
    assert len(accuracy) == 10
    assert min(accuracy[:5]) > 0.9
    assert accuracy[-1] < 0.6  # one in three
    assert figures["held_out_loss"] < 0.6


def test_only_pictures_of_one_kind_will_do():
    pictures = tiny_pictures()
    labels = torch.zeros(12, 20, dtype=torch.uint8)
    labels[torch.arange(12), torch.arange(12)] = 1
    labels[:, 15:] = 1  # what else is in the picture does not matter
    assert kinds_of(replace(pictures, labels=labels.numpy())).tolist() == list(range(12))
    labels[3, 4] = 1
    with pytest.raises(UserError, match=r"data\.compositions must be one, two and three only"):
        kinds_of(replace(pictures, labels=labels.numpy()))
    with pytest.raises(UserError, match="only rendered postcards say it"):
        kinds_of(replace(pictures, labels=None))


def test_the_script_trains_one_that_the_model_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["model.block_out_channels=[8, 8]", "data.count=8", "data.held_out=4", "run.max_train_steps=2"]
    options = [word for each in small for word in ("--set", each)]
    config = str(ROOT / "configs" / "postcard_classifier.yaml")
    argv = ["train_classifier.py", "--config", config, "--model", str(embedded()), "--run_dir", "run"]
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    runpy.run_path(str(ROOT / "scripts" / "train_classifier.py"), run_name="__main__")
    parts = load_folder(embedded(), None)
    read = read_classifier(tmp_path / "run" / "export", parts.vae, torch.device("cpu"))
    assert read.network.config.classes == KINDS
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_loss", "accuracy_0", "accuracy_999"} <= rows[-1].keys()
