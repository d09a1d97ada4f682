"""The models that a server has: listed from a folder, read when asked for, dropped when memory asks."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm.adapters.lora import name_of
from ldm.checkpoint.hub import IMAGE_ENCODER
from ldm.errors import UserError
from ldm.images.pixels import to_pil
from ldm.pipeline.preview import decoder
from ldm.spelling import unknown

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Pipeline

SIDE = 256  # pixels: the longest side of a preview
SAFE = ".safetensors"
PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
WITH = "/"  # between a model and the VAE that it has in place of its own: no name of a file holds it
NEEDED = 1.5  # times the size of its files is to be free before a model is read
log = logging.getLogger("ldm.serve")


class NoSuchModel(UserError):
    """For a name that is none of the server's models."""


class Preview:
    """Small pictures of latents [1, c, h, w], from whichever thread asks. What that takes is fitted once."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    @cached_property
    def _decode(self) -> Callable[[Tensor], Tensor]:
        return decoder(self._pipe)

    def __call__(self, latents: Tensor) -> Image:
        """Raises ValueError and FloatingPointError where 16 bits were not enough on the way."""
        (image,) = to_pil(self._decode(latents))
        image.thumbnail((SIDE, SIDE))
        return image


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in memory."""

    name: str
    pipe: Pipeline
    preview: Preview


class Shelf:
    """The models of one device. `default` is always there; others come from `folder` when they are named.

    Args:
        read: of a path the pipeline, on this shelf's device. Raises UserError.
        most: models in memory at once, the default among them.
        control_dir: the folder of ControlNets and IP-Adapters that requests may name.
    """

    def __init__(
        self,
        default: Pipeline,
        read: Callable[[Path], Pipeline],
        folder: Path | None = None,
        most: int = 2,
        control_dir: Path | None = None,
    ) -> None:
        self.default, self.folder, self.most, self._read = default.name, folder, most, read
        self.control_dir = control_dir
        self._lora_dir, self._lock = default.lora_dir, threading.RLock()
        # Never changed in place: other threads look at it.
        self._held = {default.name: Loaded(default.name, default, Preview(default))}

    @property
    def places(self) -> dict[str, Path | None]:
        """The names of all models, and where they lie; None for the one that the server began with."""
        found = {} if self.folder is None else dict(models_in(self.folder))
        return {self.default: None, **{name: p for name, p in found.items() if name != self.default}}

    @property
    def loras(self) -> dict[str, Path]:
        """The LoRAs that prompts may name."""
        held = self._held[self.default].pipe.adapted.loras
        return {lora.name: lora.file.path for lora in held} | dict(loras_in(self._lora_dir))

    @property
    def vaes(self) -> dict[str, Path]:
        """The VAEs that a model may have in place of its own: of `vae` or `VAE` in the folder of models."""
        folders = [] if self.folder is None else [self.folder / name for name in ("VAE", "vae")]
        return {name: path for folder in folders for name, path in parts_in(folder)}

    @property
    def networks(self) -> dict[str, Path]:
        """The ControlNets, T2I-Adapters and IP-Adapters that requests may name."""
        found = {} if self.control_dir is None else dict(parts_in(self.control_dir))
        return {name: path for name, path in found.items() if name != IMAGE_ENCODER}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Those in memory, the least recently used first."""
        return tuple(self._held)

    @property
    def worlds(self) -> dict[str, dict[str, Any]]:
        """What those in memory can draw, of each that says so: things with all their names, places, ..."""
        held = {name: each.pipe.world for name, each in self._held.items()}
        return {
            name: world.model_dump(mode="json", exclude={"words", "near"}, exclude_defaults=True)
            for name, world in held.items()
            if world is not None
        }

    def name_of(self, asked: str | None, vae: str | None = None) -> str:
        """The name of a model as the server has it, with another VAE "model/vae".

        Raises UserError for one that is not there.
        """
        model, _, named = (asked or self.default).partition(WITH)
        vae, places = vae or named or None, self.places
        if model not in places:
            raise NoSuchModel(str(unknown("model", model, list(places))))
        if vae is None:
            return model
        if vae not in self.vaes:
            raise NoSuchModel(str(unknown("VAE", vae, list(self.vaes))))
        return f"{model}{WITH}{vae}"

    def __call__(self, name: str) -> Loaded:
        """The model of a name, read if it is not in memory. Raises UserError."""
        with self._lock:
            model, _, vae = name.partition(WITH)
            if name not in self._held and vae:
                self._held = {**self._held, name: self._with_vae(self(model), name, vae)}
            elif name not in self._held:
                place = self.places.get(name)
                if place is None:
                    raise NoSuchModel(str(unknown("model", name, list(self.places))))
                self._make_room(sum(map(_size, files_of(place))))
                log.info("reading the model %s", name)
                pipe = self._read(place)
                self._held = {**self._held, name: Loaded(name, pipe, Preview(pipe))}
            found = self._held[name]
            self._held = {key: each for key, each in self._held.items() if key != name} | {name: found}
            return found

    def _with_vae(self, model: Loaded, name: str, vae: str) -> Loaded:
        """A model that shares all but the VAE. Raises UserError."""
        place = self.vaes.get(vae)
        if place is None:
            raise NoSuchModel(str(unknown("VAE", vae, list(self.vaes))))
        log.info("reading the VAE %s", vae)
        pipe = model.pipe.with_vae(place)
        others = [
            each for each in self._held if WITH in each
        ]  # one at a time: they are small, and quick to read
        self._held = {key: each for key, each in self._held.items() if key not in others}
        return Loaded(name, pipe, Preview(pipe))

    def _make_room(self, size: int) -> None:
        """Drop models, the least recently used first, until another one of `size` bytes fits."""
        runtime = self._held[self.default].pipe.runtime
        for name in [name for name in self._held if name != self.default]:
            if len(self._held) < self.most and runtime.free_memory > NEEDED * size:
                return
            log.info("dropping the model %s", name)
            self._held = {key: each for key, each in self._held.items() if key != name}


def models_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Pipeline folders and files, of safetensors; nothing with a pickle in it, nothing linked elsewhere."""
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if not _is_inside(path, folder):
            continue
        if path.is_file() and path.suffix == SAFE:
            yield path.stem, path
        elif (path / "model_index.json").is_file():
            kinds = {each.suffix for each in files_of(path)}
            if SAFE in kinds and not kinds & PICKLES and all(_is_inside(f, folder) for f in files_of(path)):
                yield path.name, path


def parts_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Networks of safetensors, files and folders of their own; nothing linked elsewhere."""
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if not _is_inside(path, folder):
            continue
        if path.is_file() and path.suffix == SAFE:
            yield path.stem, path
        elif (path / "config.json").is_file() and not (path / "model_index.json").exists():
            kinds = {each.suffix for each in files_of(path)}
            if SAFE in kinds and not kinds & PICKLES and all(_is_inside(f, folder) for f in files_of(path)):
                yield path.name, path


def loras_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """The safetensors in a folder and below it, by their names."""
    for path in sorted(folder.rglob(f"*{SAFE}") if folder.is_dir() else ()):
        if path.is_file() and _is_inside(path, folder):
            yield name_of(path), path


def files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether it lies there once links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _size(path: Path) -> int:
    return path.stat().st_size
