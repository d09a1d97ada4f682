"""Pictures of the sprite world for the trainers: images in memory-mapped arrays, or latents without images.

Everything about scene k follows from (seed, k). What takes long is made in parts, each of which is kept: a
run that is stopped goes on with the part that it was at.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from ldm.files import whole_file
from ldm.models import AutoencoderKL, AutoencoderTiny
from ldm.postcards.sprites import mixture
from ldm.postcards.sprites.labels import PAINTS, AnyScene, Labels, thing_cells
from ldm.postcards.sprites.scene import make_world
from ldm.pretrain.clip import tokenise
from ldm.pretrain.data import Pictures, digest_of
from ldm.pretrain.recipe import DataSection
from ldm.pretrain.unet import LatentDataset, encode
from ldm.prompts.tokenizer import CLIPTokenizer
from ldm.runtime import has_bf16

_PART = 256  # scenes that are made and kept at once
Arrays = dict[str, NDArray[Any]]


def make_mixture(data: DataSection) -> mixture.Mixture:
    """The scenes that the recipe asks for."""
    assert data.sprites is not None
    world = make_world(data.sprites.things, data.sprites.styles)
    compositions: dict[str, float] = dict(data.sprites.compositions.items())
    return mixture.Mixture(world, data.sprites.postcards, compositions or None)


def scene_of(mixed: mixture.Mixture, data: DataSection, number: int) -> tuple[AnyScene, random.Random]:
    """Scene `number`, and the generator that goes on to tell it."""
    rng = random.Random(f"{data.seed}-{number}")
    return mixed.sample(rng), rng


def sprite_pictures(data: DataSection) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures with captions, rendered once: 0.1 GB per 2,000 at 128 px."""
    mixed, total = make_mixture(data), data.count + data.held_out

    def make(start: int, stop: int) -> Arrays:
        scenes = [scene_of(mixed, data, number)[0] for number in range(start, stop)]
        return {"images": np.stack([mixture.render(scene, data.size) for scene in scenes])}

    arrays = in_parts(_folder(data, "pictures"), total, make)
    captions = []
    for number in range(total):
        scene, rng = scene_of(mixed, data, number)
        captions.append([mixture.caption(scene, rng, data.reworded) for _ in range(data.captions)])
    every = Pictures(arrays["images"], captions)
    return every.slice(slice(0, data.count)), every.slice(slice(data.count, None))


@torch.no_grad()
def sprite_latents(
    data: DataSection, vae: AutoencoderKL | AutoencoderTiny, tokenizer: CLIPTokenizer, repainted: bool
) -> tuple[LatentDataset, LatentDataset]:
    """Training and held-out latents and captions; the pictures themselves are not kept.

    With `repainted` also the latents of the same scenes with their painted things in other colours.
    """
    mixed, total, weights = make_mixture(data), data.count + data.held_out, digest_of(vae)
    cells = data.size // vae.downscale
    labels = Labels(len(mixed.world.things))

    def make(start: int, stop: int) -> Arrays:
        scenes, captions, others, names_colours = [], [], [], []
        for number in range(start, stop):
            scene, rng = scene_of(mixed, data, number)
            scenes.append(scene)
            captions.append([mixture.caption(scene, rng, data.reworded) for _ in range(data.captions)])
            others.append(mixture.repainted(scene, rng) if repainted else None)
            names_colours.append(
                [others[-1] is not None and mixture.names_colours(scene, text) for text in captions[-1]]
            )
        made: Arrays = {
            "latents": _encode([mixture.render(scene, data.size) for scene in scenes], vae),
            "token_ids": tokenise(tokenizer, captions).numpy(),
            "weights": np.stack([mixture.object_cells(scene, cells) for scene in scenes]),
            "things": np.stack([thing_cells(scene, cells // 2) for scene in scenes]),
        }
        if repainted:
            made["repainted"], made["names_colours"] = made["latents"].copy(), np.array(names_colours)
            changed = [i for i, other in enumerate(others) if other is not None]
            drawn = [mixture.render(other, data.size) for other in others if other is not None]
            if changed:
                made["repainted"][changed] = _encode(drawn, vae)
        return made

    vocabulary = sorted(tokenizer.get_vocab().items())
    arrays = in_parts(_folder(data, "latents", weights, vocabulary, repainted), total, make)
    every = LatentDataset(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        vae=weights,
        kinds=labels.kinds,
        paints=PAINTS,
    )
    return every.slice(slice(0, data.count)), every.slice(slice(data.count, None))


def in_parts(folder: Path, total: int, make: Callable[[int, int], Mapping[str, NDArray[Any]]]) -> Arrays:
    """Arrays of `total` rows in `folder`, which `make(start, stop)` gives a part of: made once, then mapped.

    `done.json` says how many rows are there; what comes after them is made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "done.json"
    with FileLock(folder / ".lock"):
        done = json.loads(record.read_text(encoding="utf-8")) if record.exists() else 0
        while done < total:
            stop = min(done + _PART, total)
            for name, part in make(done, stop).items():
                file, shape = folder / f"{name}.npy", (total, *part.shape[1:])
                if done:
                    whole = np.lib.format.open_memmap(file, "r+")
                else:
                    whole = np.lib.format.open_memmap(file, "w+", part.dtype, shape)
                whole[done:stop] = part
                whole.flush()
            done = stop
            with whole_file(record) as aside:
                aside.write_text(json.dumps(done), encoding="utf-8")
            if done % (16 * _PART) == 0:
                print(f"{folder.name}: {done} of {total}", flush=True)
    # Copies on write: torch warns of arrays that cannot be written to.
    return {file.stem: np.load(file, mmap_mode="c") for file in folder.glob("*.npy")}


def _encode(images: list[NDArray[np.uint8]], vae: AutoencoderKL | AutoencoderTiny) -> NDArray[np.float16]:
    """Latents fp16 [N, c, h, w]; bf16 is quicker only where a CPU has units for it."""
    bf16 = has_bf16(torch.device("cpu"))
    latents: NDArray[np.float16] = encode(Pictures(np.stack(images), []), vae, bf16).numpy()
    return latents


def _folder(data: DataSection, *what: object) -> Path:
    """A name that changes with the recipe and with what else the rows follow from.

    Not with the code that draws: a run's data stay as they are while it goes on, so its cache is its own.
    """
    section = data.model_dump(mode="json", exclude={"cache"})
    key = hashlib.sha256(repr((json.dumps(section), what)).encode())
    return data.cache / f"sprites-{what[0]}-{key.hexdigest()[:12]}"
