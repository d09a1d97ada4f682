"""Pictures with captions, in memory-mapped arrays: rendered postcards or a folder of images."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import ImageOps
from torch import nn

from ldm.dataset.examine import examine
from ldm.errors import UserError
from ldm.files import whole_file
from ldm.images.opening import open_picture
from ldm.pretrain.recipe import DataSection

if TYPE_CHECKING:
    from ldm.postcards import Scene
    from ldm.postcards.canvas import RGB


@dataclass(frozen=True)
class Pictures:
    """A set of pictures, all of one size.

    images: uint8 [N, H, W, 3]; captions: N lists of at least one caption.
    labels: multi-hot [N, L] of what is in each picture; masks: uint8 [N, H/8, W/8], 255 where an object
    covers the cell; things: uint8 [N, H/16, W/16], which thing has its room there (0: none). All only
    where the source knows them (the postcards do).
    repainted: uint8 [N, H, W, 3], the same with the things in other colours, and names_colours: bool
    [N, captions], which of the captions say all colours; where they were asked for.
    """

    images: NDArray[np.uint8]
    captions: list[list[str]]
    labels: NDArray[np.uint8] | None = None
    masks: NDArray[np.uint8] | None = None
    things: NDArray[np.uint8] | None = None
    repainted: NDArray[np.uint8] | None = None
    names_colours: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def slice(self, part: slice) -> Pictures:
        """Some of the pictures, sharing memory."""
        return Pictures(**{name: value[part] for name, value in vars(self).items() if value is not None})

    @property
    def every(self) -> int:
        """Every so many-th picture stands for all: 64 of them, or up to twice as many."""
        return max(1, len(self) // 64)

    def digest(self) -> hashlib._Hash:
        """SHA-256 of some of the pictures, to go on from: it names what is made of them."""
        return hashlib.sha256(np.ascontiguousarray(self.images[:: self.every]).tobytes())

    def tensors(self, index: torch.Tensor) -> torch.Tensor:
        """Pictures `index` as float [B, 3, H, W] in [-1, 1]."""
        batch = torch.from_numpy(self.images[index.numpy()])
        return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def load_pictures(data: DataSection, repainted: bool = False) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures; postcards with repainted ones, if asked for.

    Raises UserError when a folder has too few usable images, and for sprites.
    """
    if data.sprites is not None:
        raise UserError("data.sprites is for scripts/train_sprites.py: this trainer renders postcards")
    pictures = _postcards(data, repainted) if data.folder is None else _folder(data.folder, data.size)
    if len(pictures) <= data.held_out:
        raise UserError(
            f"{len(pictures)} pictures found, but {data.held_out} are held out: lower data.held_out"
        )
    trained = len(pictures) - data.held_out
    return pictures.slice(slice(0, trained)), pictures.slice(slice(trained, None))


def crop_squares(x: torch.Tensor, corners: list[list[int]], side: int) -> torch.Tensor:
    """Squares [B, C, side, side] of x [B, C, H, W], each from its own corner: row and column, in pixels."""
    places = [[slice(start, start + side) for start in corner] for corner in corners]
    return torch.stack([each[:, rows, columns] for each, (rows, columns) in zip(x, places, strict=True)])


def digest_of(network: nn.Module) -> str:
    """SHA-256 of a network's weights in fp32."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.float().numpy().tobytes())
    return digest.hexdigest()


def cached(file: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The array in `file` (.npy), which one of several processes makes and writes if it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.stem}.lock")):
        if not file.exists():
            threads = torch.get_num_threads()
            torch.set_num_threads(os.cpu_count() or 1)  # other processes of the run are waiting
            with whole_file(file) as aside, aside.open("wb") as opened:
                np.save(opened, make().numpy())
            torch.set_num_threads(threads)
    return torch.from_numpy(np.load(file))


# --- postcards ---------------------------------------------------------------------------------------------


def _postcards(data: DataSection, repainted: bool) -> Pictures:
    """Render `count` + `held_out` postcards once; later runs map the files.

    They take 0.1 GB per 2,000 at 128 px, and twice that with repainted ones.
    """
    total = data.count + data.held_out
    mix = list(data.compositions.items())
    said = f"{data.captions}-{data.reworded}"
    painted = f"{data.shades}-repainted-named" if repainted else f"{data.shades}"
    key = f"{_world_hash()}-{total}-{data.size}-{said}-{mix}-{painted}-{data.seed}"
    folder = data.cache / f"postcards-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # of several processes one renders
        if not (folder / "captions.json").exists():
            _render_all(folder, total, data, repainted)
    arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
    return Pictures(captions=json.loads((folder / "captions.json").read_text(encoding="utf-8")), **arrays)


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


def _things(scene: Scene, cells: int) -> NDArray[np.uint8]:
    """Whose room each cell is in, [cells, cells]: a `thing_number` or 0."""
    from ldm.postcards.vocabulary import thing_number

    centres = (np.arange(cells) + 0.5) / cells
    things = np.zeros((cells, cells), np.uint8)
    for group in scene.groups:
        for box in group.boxes:
            rows = (box.top <= centres) & (centres <= box.bottom)
            columns = (box.left <= centres) & (centres <= box.right)
            things[np.ix_(rows, columns)] = thing_number(group.kind, group.colour)
    return things


def _render_all(folder: Path, total: int, data: DataSection, repainted: bool) -> None:
    files: dict[str, np.memmap[Any, Any]] = {}
    captions: list[list[str]] = []
    jobs = [(start, min(start + 500, total), data, repainted) for start in range(0, total, 500)]
    with ProcessPoolExecutor() as pool:
        for (start, stop, *_), part in zip(jobs, pool.map(_render_some, jobs), strict=True):
            captions += part.captions
            for name, array in vars(part).items():
                if isinstance(array, np.ndarray):
                    if name not in files:
                        file, shape = folder / f"{name}.npy", (total, *array.shape[1:])
                        files[name] = np.lib.format.open_memmap(file, "w+", array.dtype, shape)
                    files[name][start:stop] = array
    for written in files.values():
        written.flush()
    with whole_file(folder / "captions.json") as aside:  # it says that all is there
        aside.write_text(json.dumps(captions), encoding="utf-8")


def _render_some(job: tuple[int, int, DataSection, bool]) -> Pictures:
    from ldm import postcards

    start, stop, data, repainted = job
    images, captions, labels, masks, things, others, named = [], [], [], [], [], [], []
    cells = data.size // 8
    for number in range(start, stop):
        rng = random.Random(f"{data.seed}-{number}")
        scene = postcards.sample_scene(rng, compositions=data.compositions)
        images.append(postcards.render(scene, data.size, _paints(scene, number, data)))
        captions.append([_caption(scene, rng, data.reworded) for _ in range(data.captions)])
        labels.append(_multi_hot(scene))
        things.append(_things(scene, data.size // 16))
        mask = postcards.object_mask(scene, data.size).reshape(cells, 8, cells, 8).mean((1, 3))
        masks.append((mask * 255).astype(np.uint8))
        if repainted:
            paints = postcards.repaint(scene, random.Random(f"repainted {data.seed}-{number}"))
            others.append(postcards.render(scene, data.size, paints))
            named.append([postcards.names_colours(scene, text) for text in captions[-1]])
    rendered = Pictures(np.stack(images), captions, np.stack(labels), np.stack(masks), np.stack(things))
    return (
        replace(rendered, repainted=np.stack(others), names_colours=np.array(named))
        if repainted
        else rendered
    )


def _paints(scene: Scene, number: int, data: DataSection) -> list[RGB] | None:
    """Other paints for some postcards' things; from numbers of their own: the rest stays the same."""
    from ldm import postcards

    rng = random.Random(f"paints {data.seed}-{number}")
    shaded = rng.random() < data.shades
    return [postcards.shade(group.colour, rng) for group in scene.groups] if shaded else None


def _caption(scene: Scene, rng: random.Random, reworded: float) -> str:
    from ldm import postcards

    text = postcards.caption(scene, rng)
    return postcards.reword(text, rng) if reworded and rng.random() < reworded else text


# --- a folder of images ------------------------------------------------------------------------------------


def _folder(folder: Path, size: int) -> Pictures:
    """Every picture that `examine` finds fit, its shorter side scaled to `size` and cropped at the centre.

    Raises UserError where something stops the training; a missing caption is an empty one.
    """
    examined = examine(folder, missing_caption="empty", resolution=size)
    for finding in examined.findings:
        if finding.effect == "stops":
            raise UserError(f"{finding.path or folder}: {finding.text}; `ldm folder {folder}` tells all")
    pictures = [np.asarray(ImageOps.fit(open_picture(each.path), (size, size))) for each in examined.examples]
    return Pictures(np.stack(pictures), [[each.caption or ""] for each in examined.examples])
