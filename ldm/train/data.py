"""Pictures with captions, in memory-mapped arrays: rendered postcards or a folder of images."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps

from ldm.errors import UserError
from ldm.train.folder import examine, open_upright
from ldm.train.recipe import DataSection

if TYPE_CHECKING:
    from ldm.postcards import Scene


@dataclass(frozen=True)
class Pictures:
    """A set of pictures, all of one size.

    images: uint8 [N, H, W, 3]; captions: N lists of at least one caption.
    labels: multi-hot [N, L] of what is in each picture, and masks: uint8 [N, H/8, W/8], 255 where an object
    covers the cell; both only where the source knows them (the postcards do).
    """

    images: NDArray[np.uint8]
    captions: list[list[str]]
    labels: NDArray[np.uint8] | None = None
    masks: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def slice(self, part: slice) -> Pictures:
        """Some of the pictures, sharing memory."""
        return Pictures(
            self.images[part],
            self.captions[part],
            None if self.labels is None else self.labels[part],
            None if self.masks is None else self.masks[part],
        )

    def tensors(self, index: torch.Tensor) -> torch.Tensor:
        """Pictures `index` as float [B, 3, H, W] in [-1, 1]."""
        batch = torch.from_numpy(self.images[index.numpy()])
        return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def load_pictures(data: DataSection) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures. Raises UserError when a folder has too few usable images."""
    pictures = _postcards(data) if data.folder is None else _folder(data.folder, data.size)
    if len(pictures) <= data.held_out:
        raise UserError(
            f"{len(pictures)} pictures found, but {data.held_out} are held out: lower data.held_out"
        )
    cut = len(pictures) - data.held_out
    return pictures.slice(slice(0, cut)), pictures.slice(slice(cut, None))


# --- postcards ---------------------------------------------------------------------------------------------


def _postcards(data: DataSection) -> Pictures:
    """Render `count` + `held_out` postcards once; later runs map the files. 0.1 GB per 2,000 at 128 px."""
    total = data.count + data.held_out
    key = f"{_world_hash()}-{total}-{data.size}-{data.captions}-{data.seed}"
    folder = data.cache / f"postcards-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "captions.json").exists():
        _render_all(folder, total, data)
    return Pictures(
        np.load(folder / "images.npy", mmap_mode="r"),
        json.loads((folder / "captions.json").read_text()),
        np.load(folder / "labels.npy"),
        np.load(folder / "masks.npy"),
    )


def _world_hash() -> str:
    """Changes when the code that draws and captions changes, so that a stale cache is never read."""
    from ldm import postcards

    sources = sorted(Path(str(postcards.__file__)).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _multi_hot(scene: Scene) -> NDArray[np.uint8]:
    """What a caption may name: kinds, (kind, colour) pairs, counts of two and three, place, time, weather."""
    from ldm import postcards as world

    named = world.encode_labels(scene)
    present = named.count > 0
    pairs = (named.colour[:, None] == np.arange(len(world.COLOURS))) & present[:, None]
    counts = named.count[:, None] == np.array([2, 3])
    parts = [present, pairs.ravel(), counts.ravel()]
    for value, names in (
        (named.place, world.PLACES),
        (named.time, world.TIMES),
        (named.weather, world.WEATHERS),
    ):
        parts.append(np.arange(len(names)) == value)
    return np.concatenate(parts).astype(np.uint8)


def _render_all(folder: Path, total: int, data: DataSection) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size, cells = data.size, data.size // 8
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (total, size, size, 3))
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, (total, cells, cells))
    labels: list[NDArray[np.uint8]] = []
    captions: list[list[str]] = []
    jobs = [(start, min(start + 500, total), data) for start in range(0, total, 500)]
    with ProcessPoolExecutor() as pool:
        for (start, stop, _), part in zip(jobs, pool.map(_render_some, jobs), strict=True):
            images[start:stop], masks[start:stop] = part.images, part.masks
            labels.append(part.labels)  # type: ignore[arg-type]
            captions.extend(part.captions)
    np.save(folder / "labels.npy", np.concatenate(labels))
    images.flush()
    masks.flush()
    (folder / "captions.json").write_text(json.dumps(captions))


def _render_some(job: tuple[int, int, DataSection]) -> Pictures:
    from ldm import postcards

    start, stop, data = job
    images, captions, labels, masks = [], [], [], []
    cells = data.size // 8
    for number in range(start, stop):
        rng = random.Random(f"{data.seed}-{number}")
        scene = postcards.sample_scene(rng)
        images.append(postcards.render(scene, data.size))
        captions.append([postcards.caption(scene, rng) for _ in range(data.captions)])
        labels.append(_multi_hot(scene))
        mask = postcards.object_mask(scene, data.size).reshape(cells, 8, cells, 8).mean((1, 3))
        masks.append((mask * 255).astype(np.uint8))
    return Pictures(np.stack(images), captions, np.stack(labels), np.stack(masks))


# --- a folder of images ------------------------------------------------------------------------------------


def _folder(folder: Path, size: int) -> Pictures:
    """Every picture that `examine` finds fit, its shorter side scaled to `size` and cropped at the centre.

    Raises UserError where something stops the training; a missing caption is an empty one.
    """
    examined = examine(folder, missing_caption="empty", resolution=size)
    for finding in examined.findings:
        if finding.effect == "stops":
            raise UserError(f"{finding.path or folder}: {finding.text}; `ldm folder {folder}` tells all")
    pictures = [np.asarray(ImageOps.fit(open_upright(each.path), (size, size))) for each in examined.examples]
    return Pictures(np.stack(pictures), [[each.caption or ""] for each in examined.examples])
