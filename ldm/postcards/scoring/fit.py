"""Training the scorer on renders made as it goes, never the same one twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from ldm import postcards as world
from ldm.postcards.scoring.agreement import agreement, truth
from ldm.postcards.scoring.scorer import SIZE, Scorer, Scores
from ldm.postcards.scoring.soften import melt, soften
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch, Task


class ScorerTask(Task):
    """Trains a scorer on softened renders; every fourth scene holds a combination kept from the generator.

    An instrument must read those as well as any other, or it would count against the generator what it
    cannot see itself. loss keys: the weight of any part of the loss, and melted, the share of pictures whose
    objects are made unnameable.
    """

    def __init__(self, scorer: Scorer, held_out: int, loss: dict[str, float]) -> None:
        super().__init__()
        self.scorer = scorer
        plain = dict.fromkeys(("count", "colour", "attention", "place", "time", "weather"), 1.0)
        self.weights = loss_settings(plain | {"density": 0.5, "centre": 4.0, "melted": 0.08}, loss)
        self.scenes = scenes_from(range(held_out), "scorer held-out")

    def batch(self, rng: Generator, size: int, number: int = 0) -> Batch:
        seeds = torch.randint(2**62, (size,), generator=rng).tolist()
        scenes = scenes_from(seeds, "scorer")
        images = torch.from_numpy(np.stack([world.render(scene, SIZE) for scene in scenes]))
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = truth(scenes)
        batch = {
            name: torch.from_numpy(getattr(labels, name))
            for name in ("count", "colour", "x", "y", "place", "time", "weather")
        }
        batch["density"] = torch.from_numpy(np.stack([density(scene) for scene in scenes]))
        melted = (torch.rand(size, generator=rng) < self.weights["melted"]).nonzero()[:, 0]
        if len(melted):
            masks = np.stack([world.object_mask(scenes[i], SIZE) for i in melted.tolist()])
            x[melted] = melt(x[melted], torch.from_numpy(masks)[:, None].float(), rng)
            batch["count"][melted] = 0
            batch["density"][melted] = 0
        return batch | {"images": soften(x, rng)}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores: Scores = self.scorer(batch["images"])
        count, density = batch["count"], batch["density"]  # [B, K], [B, K, 16, 16]
        there = count > 0
        things = there.sum().clamp(min=1)
        spread = density[there] / count[there][:, None, None]
        centre = torch.stack([batch["x"], batch["y"]], -1)[there]
        parts = {
            "count": F.cross_entropy(scores.count.flatten(0, 1), count.flatten(), reduction="sum")
            / len(count),
            "colour": F.cross_entropy(scores.colour[there], batch["colour"][there], reduction="sum") / things,
            "density": F.binary_cross_entropy_with_logits(scores.density, density, reduction="sum")
            / len(count),
            "attention": -(spread * scores.attention[there]).sum() / things,
            "centre": (scores.centre[there] - centre).abs().sum() / (2 * things),
            "place": F.cross_entropy(scores.place, batch["place"]),
            "time": F.cross_entropy(scores.time, batch["time"]),
            "weather": F.cross_entropy(scores.weather, batch["weather"]),
        }
        loss = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        return loss, {name: value.detach() for name, value in parts.items()}

    def evaluate(self) -> dict[str, float]:
        """Shares of what is read right on held-out renders; see `agreement`."""
        images = np.stack([world.render(scene, SIZE) for scene in self.scenes])
        rates = agreement(self.scorer.read(images), truth(self.scenes))
        return {name.replace(" ", "_"): value.share for name, value in rates.items()}

    def picture(self, folder: Path) -> Image.Image | None:
        """None: a scorer draws nothing."""
        return None

    def export(self, folder: Path) -> None:
        self.scorer.save(folder)


def scenes_from(seeds: Sequence[int], stream: str) -> list[world.Scene]:
    """One scene for each seed; every fourth has a combination that the generator is never trained on."""
    return [
        world.sample_scene(random.Random(f"{stream} {seed}"), held_out=i % 4 == 3)
        for i, seed in enumerate(seeds)
    ]


def density(scene: world.Scene, cells: int = 16, width: float = 0.075) -> NDArray[np.float32]:
    """[K, cells, cells]: a Gaussian of standard deviation `width` and sum 1 at the centre of each thing."""
    maps = np.zeros((len(world.KINDS), cells, cells), np.float32)
    place = (np.arange(cells) + 0.5) / cells
    for group in scene.groups:
        for box in group.boxes:
            across, down = (np.exp(-((place - at) ** 2) / (2 * width**2)) for at in (box.x, box.y))
            bump = down[:, None] * across
            maps[world.KINDS.index(group.kind)] += (bump / bump.sum()).astype(np.float32)
    return maps
