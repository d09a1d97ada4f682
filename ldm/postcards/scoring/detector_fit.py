"""Training the detector on renders made as it goes, of sprites and of postcards, never the same one twice."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from ldm import postcards
from ldm.postcards.scoring.agreement import agreement, truth
from ldm.postcards.scoring.detector import Detector, cuts
from ldm.postcards.scoring.names import Names, kind_of, style_of
from ldm.postcards.scoring.scorer import SIZE
from ldm.postcards.scoring.soften import melt, soften
from ldm.postcards.sprites.labels import AnyScene
from ldm.postcards.sprites.mixture import object_cells, render
from ldm.postcards.sprites.scene import Unseen, World, sample_scene
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch, Task

CELLS = 16  # of the map on which things are located, across and down
_UNSEEN: Sequence[Unseen] = ("colour", "place", "style")
_WIDTH = 0.8  # cells: the standard deviation of a thing's middle on the map
_MOVED, _SCALED = 0.05, 0.09  # of cuts: how far off the box found may be
_NEAR = 1.5  # cells: so near to a thing's middle its box is asked for


class DetectorTask(Task):
    """Trains a detector on softened renders; every fourth scene holds a combination kept from the generator.

    loss keys: the weight of any part of the loss; melted, the share of pictures whose things are made
    unnameable; postcards, that of postcards; located, that of pictures that are looked at as wholes: where
    things are is learnt long before what they are.
    """

    def __init__(self, detector: Detector, seen: World, held_out: int, loss: dict[str, float]) -> None:
        super().__init__()
        self.detector, self.seen = detector, seen
        parts = {"heat": 1.0, "sides": 10.0, "place": 0.5, "time": 0.5, "weather": 0.5}
        parts |= {"kind": 1.0, "style": 0.3, "colour": 0.5}
        shares = {"melted": 0.06, "postcards": 0.12, "located": 0.125}
        self.weights = loss_settings(parts | shares, loss, shares=tuple(shares))
        self.scenes = [self._scene(f"detector held-out {k}", k) for k in range(held_out)]

    def _scene(self, name: str, number: int) -> AnyScene:
        rng, unseen = random.Random(name), number % 4 == 3
        if rng.random() < self.weights["postcards"]:
            return postcards.sample_scene(rng, held_out=unseen)
        return sample_scene(self.seen, rng, unseen=rng.choice(_UNSEEN) if unseen else None)

    def batch(self, rng: Generator, size: int, number: int = 0) -> Batch:
        seeds = torch.randint(2**62, (size,), generator=rng).tolist()
        scenes = [self._scene(f"detector {seed}", k) for k, seed in enumerate(seeds)]
        images = np.stack([render(scene, SIZE) for scene in scenes])
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        known = self.detector.config
        labels = truth(scenes, known)
        batch = {name: torch.from_numpy(getattr(labels, name)) for name in ("place", "time", "weather")}
        melted = torch.rand(size, generator=rng) < self.weights["melted"]
        if melted.any():
            masks = np.stack([object_cells(scenes[i], 64) for i in melted.nonzero()[:, 0].tolist()])
            cover = F.interpolate(torch.from_numpy(masks)[:, None].float() / 255, (SIZE, SIZE))
            x[melted] = melt(x[melted], cover, rng)
        located = [locations(scene) for scene in scenes]
        batch["heat"] = torch.from_numpy(np.stack([heat for heat, _ in located]))
        batch["heat"][melted] = 0
        batch["sides"] = torch.from_numpy(np.stack([sides for _, sides in located]))
        batch["sides"][melted] = np.nan
        return batch | self._looks(scenes, melted, rng) | {"images": soften(x, rng)}

    def _looks(self, scenes: Sequence[AnyScene], melted: Tensor, rng: Generator) -> Batch:
        """Boxes of all things, each moved a little, and what is in them: -1 where nothing is to be said."""
        known = self.detector.config
        found = [(k, *thing) for k, scene in enumerate(scenes) for thing in things_in(scene, known)]
        rows = torch.tensor([k for k, *_ in found], dtype=torch.int64)
        boxes = torch.tensor([box for _, box, *_ in found]).view(-1, 4)
        kind, style, colour = (
            torch.tensor([each[part] for each in found], dtype=torch.int64) for part in (2, 3, 4)
        )
        gone = melted[rows]
        return {
            "rows": rows,
            "boxes": _moved(boxes, rng),
            "kind": kind.masked_fill(gone, len(known.kinds)),
            "style": style.masked_fill(gone, -1),
            "colour": colour.masked_fill(gone, -1),
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"]
        wholes = math.ceil(self.weights["located"] * len(images))
        seen = self.detector.locate(images[:wholes])
        named = self.detector.name(cuts(images, batch["boxes"], batch["rows"]))
        sides = batch["sides"][:wholes]
        near = sides.isfinite()
        facts = ("place", "time", "weather")
        parts = {
            "heat": heat_loss(seen.heat, batch["heat"][:wholes]),
            "sides": (seen.sides - sides)[near].abs().sum() / near.sum().clamp(min=1),
            **{name: _entropy(getattr(seen, name), batch[name][:wholes]) for name in facts},
            **{name: _entropy(getattr(named, name), batch[name]) for name in ("kind", "style", "colour")},
        }
        loss = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        return loss, {name: value.detach() for name, value in parts.items()}

    def evaluate(self) -> dict[str, float]:
        """Shares of what is read right on held-out renders; see `agreement`."""
        images = np.stack([render(scene, SIZE) for scene in self.scenes])
        rates = agreement(self.detector.read(images), truth(self.scenes, self.detector.config))
        return {name.replace(" ", "_"): value.share for name, value in rates.items()}

    def picture(self, folder: Path) -> Image.Image | None:
        """None: a detector draws nothing."""
        return None

    def export(self, folder: Path) -> None:
        self.detector.save(folder)


def things_in(scene: AnyScene, known: Names) -> list[tuple[tuple[float, ...], int, int, int]]:
    """Of each thing its box (left, top, right, bottom), and its kind, style and colour as numbers or -1."""
    style = known.styles.index(style_of(scene))
    return [
        (
            (box.left, box.top, box.right, box.bottom),
            known.kinds.index(kind_of(group)),
            style,
            known.colours.index(group.colour) if group.colour else -1,
        )
        for group in scene.groups
        for box in group.boxes
    ]


def locations(scene: AnyScene) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What `Located.heat` [16, 16] and `sides` [4, 16, 16] should be, NaN where nothing is asked of them.

    The heat is 1 in the cell that holds a thing's middle and falls off around it.
    """
    heat = np.zeros((CELLS, CELLS), np.float32)
    sides = np.full((4, CELLS, CELLS), np.nan, np.float32)
    middles = (np.arange(CELLS) + 0.5) / CELLS
    for box in (box for group in scene.groups for box in group.boxes):
        column, row = (min(int(at * CELLS), CELLS - 1) for at in (box.x, box.y))
        across, down = np.arange(CELLS) - column, np.arange(CELLS) - row
        away = across**2 + down[:, None] ** 2
        heat = np.maximum(heat, np.exp(-away / (2 * _WIDTH**2)))
        x, y = np.meshgrid(middles, middles)
        own = np.stack([x - box.left, y - box.top, box.right - x, box.bottom - y])
        sides = np.where(away < _NEAR**2, own, sides)
    return heat.astype(np.float32), sides.astype(np.float32)


def heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The focal loss of Zhou et al. 2019, "Objects as Points", eq. 1, for each picture: alpha 2, beta 4.

    -(1 - p)^2 log p where the target [B, n, n] is 1, else -(1 - target)^4 p^2 log(1 - p).
    """
    p = logits.sigmoid()
    middle = (1 - p) ** 2 * F.logsigmoid(logits)
    around = (1 - target) ** 4 * p**2 * F.logsigmoid(-logits)
    return -torch.where(target == 1, middle, around).sum() / len(logits)


def _moved(boxes: Tensor, rng: Generator) -> Tensor:
    """Boxes [N, 4] as far off as those that are found."""
    low, high = boxes[:, :2], boxes[:, 2:]
    side = (high - low).amax(1, keepdim=True)
    middle = (low + high) / 2 + _MOVED * side * torch.randn(len(boxes), 2, generator=rng)
    half = (high - low) / 2 * (_SCALED * torch.randn(len(boxes), 1, generator=rng)).exp()
    return torch.cat([middle - half, middle + half], dim=1)


def _entropy(logits: Tensor, number: Tensor) -> Tensor:
    """The mean cross-entropy over what has a number (not -1), 0 if nothing has."""
    told = (number >= 0).sum().clamp(min=1)
    return F.cross_entropy(logits, number, ignore_index=-1, reduction="sum") / told
