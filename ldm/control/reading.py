"""Networks of pictures on disk: diffusers' folders, original single files, what changes a U-Net's layers.

Read as strictly as a model: what is missing, extra or of the wrong shape is an error that names it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.fill import check_names, fill, reshape
from ldm.checkpoint.io import read_tensors, weight_files
from ldm.checkpoint.original.component import build_empty, build_stored, load_section, named, with_new_names
from ldm.checkpoint.original.shapes import Tensors, hint_shape, shape_of
from ldm.checkpoint.parts import MODEL_STEM
from ldm.checkpoint.source import as_given, find
from ldm.checkpoint.weights import find_weights, open_stored
from ldm.control import layouts
from ldm.control.family import check_fit, family_named, refuse
from ldm.errors import UserError
from ldm.files import sha256
from ldm.memory.residence import asleep
from ldm.models import ControlNet, T2IAdapter, UNet
from ldm.models.control import ControlNetConfig, LLLite
from ldm.runtime import Runtime

AnyControl = ControlNet | T2IAdapter | LLLite
KEPT = 6  # networks, of the last drawings
PREFIX = "control_model."


@dataclass(frozen=True, eq=False)
class ControlFile:
    """A network, ready to use, and which files it was."""

    network: AnyControl
    path: Path
    sha256: str
    unet: UNet  # that it was read for
    is_bound: bool = False  # whether its weights are made of those of that U-Net

    @property
    def is_inside(self) -> bool:
        """Whether it changes layers of the U-Net, rather than what lies between them."""
        return isinstance(self.network, LLLite)

    def is_for(self, unet: UNet) -> bool:
        """Whether it is what would be read for another U-Net."""
        return self.unet is unet or (not self.is_bound and self.unet.config == unet.config)


class Shelf:
    """The networks of the last drawings, so that the next need not read them again. Threads may share it."""

    def __init__(self) -> None:
        self._files: dict[Any, ControlFile] = {}
        self._lock = threading.Lock()

    @property
    def networks(self) -> list[AnyControl]:
        """Those that are kept now."""
        return [file.network for file in [*self._files.values()]]

    def get(self, model: str, unet: UNet, runtime: Runtime, sleeps: bool = False) -> ControlFile:
        """The network of a folder, file or hub name, for a U-Net; `sleeps`: weights come when they are used.

        Raises UserError: what is missing or damaged, or of another family.
        """
        with self._lock:
            path = place_of(model)
            digest = digest_of(path)
            key = (path, digest, runtime, sleeps)
            file = self._files.pop(key, None)
            if file is None or not file.is_for(unet):
                with as_given({path: model}), asleep(runtime.device) if sleeps else nullcontext():
                    file = read_control(path, digest, unet, runtime)
            self._files[key] = file  # the last, from here on
            while len(self._files) > KEPT:
                del self._files[next(iter(self._files))]
            return file


@dataclass(frozen=True, eq=False)
class Reader:
    """A shelf, and what it reads for: a U-Net, where it runs, and whether weights come when they are used."""

    shelf: Shelf
    unet: UNet
    runtime: Runtime
    sleeps: bool = False

    @property
    def takes_depth(self) -> bool:
        """Whether the U-Net takes a depth map beside its latents."""
        return self.unet.config.in_channels == self.unet.config.out_channels + 1

    def get(self, model: str) -> ControlFile:
        """The network of a folder, file or hub name. Raises UserError."""
        return self.shelf.get(model, self.unet, self.runtime, self.sleeps)


def place_of(model: str) -> Path:
    """The folder or file that is meant; of a pipeline its ControlNet. Raises UserError."""
    path = find(model, part="unet")  # as of a folder of its own on the hub
    if (path / "controlnet" / "config.json").exists():
        return path / "controlnet"
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(
            f"{model}: no ControlNet in it: neither config.json nor controlnet/config.json lies there"
        )
    return path


def digest_of(path: Path) -> str:
    """64 hex digits: of the weights, and of the config where there is one."""
    if path.is_dir():
        return sha256(path / "config.json", *weight_files(find_weights(path, MODEL_STEM)))
    return sha256(path)


def read_control(path: Path, digest: str, unet: UNet, runtime: Runtime) -> ControlFile:
    """The network at a path, where a U-Net is and in its dtype. Raises UserError."""
    network, is_bound = _read(path, unet, runtime.dtype)
    if not isinstance(network, LLLite):
        check_fit(network, unet, path)
    return ControlFile(runtime.place(network), path, digest, unet, is_bound)


def _read(path: Path, unet: UNet, dtype: torch.dtype) -> tuple[AnyControl, bool]:
    if path.is_dir():
        stored = open_stored(path, MODEL_STEM)
        network = build_stored(stored)
        if not isinstance(network, ControlNet | T2IAdapter):
            raise UserError(
                f"{path}: holds a {stored.config.get('_class_name')}, which shows a model no pictures"
            )
        return fill(network, named(stored), stored.path, dtype), False
    tensors = read_tensors(path)
    for kind, read in READERS.items():
        if any(re.search(kind, name) for name in tensors):
            return read(tensors, path, unet, dtype), read is _low_rank
    few = ", ".join(list(tensors)[:2]) or "nothing"
    raise UserError(f"{path}: no ControlNet, T2I-Adapter or LLLite; it holds {few}")


def _original(tensors: Tensors, path: Path, unet: UNet, dtype: torch.dtype) -> ControlNet:
    """With the names of the paper's authors, with `control_model.` before them or not."""
    inside = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    prefix, section = (PREFIX, inside) if inside else ("", dict(tensors))
    if "difference" in section:
        raise UserError(
            f"{path}: holds differences to a U-Net (A1111's extraction): give the whole ControlNet"
        )
    base = _base_of(unet)
    try:
        shape = shape_of("controlnet", section, base)
    except KeyError as error:
        raise UserError(f"{path}: tensor {prefix}{error.args[0]} is missing; is the file complete?") from None
    _check_text(shape["cross_attention_dim"], path, unet)
    if shape["block_out_channels"] == list(unet.config.block_out_channels):
        shape["attention_head_dim"] = base["attention_head_dim"]
    config = {**base, **shape}
    network, _ = load_section("controlnet", config, section, path, prefix, dtype)
    assert isinstance(network, ControlNet)
    return network


def _diffusers(tensors: Tensors, path: Path, unet: UNet, dtype: torch.dtype) -> ControlNet:
    """With diffusers' names, in a file without a config: what shapes do not tell is as in the U-Net."""
    tensors = with_new_names(tensors)
    shape = layouts.shape_by_names(tensors, path)
    if "cross_attention_dim" in shape:
        _check_text(shape["cross_attention_dim"], path, unet)
    network = build_empty({**_base_of(unet), **shape}, path)
    assert isinstance(network, ControlNet)
    return fill(network, reshape(network.state_dict(), tensors, path), path, dtype)


def _adapter(tensors: Tensors, path: Path, unet: UNet, dtype: torch.dtype) -> T2IAdapter:
    renamed, config = layouts.adapter_of(tensors, path)
    network = build_empty(config, path)
    assert isinstance(network, T2IAdapter)
    check_names(network.state_dict(), renamed, path, has_config=False)
    return fill(network, renamed, path, dtype)


def _lllite(tensors: Tensors, path: Path, unet: UNet, dtype: torch.dtype) -> LLLite:
    """kohya's: each layer of the U-Net that is named must be there, and as wide."""
    network, renamed = layouts.lllite_of(tensors, path, unet)
    return fill(network, renamed, path, dtype)


def _low_rank(tensors: Tensors, path: Path, unet: UNet, dtype: torch.dtype) -> ControlNet:
    """Stability AI's control-lora: low-rank differences to the U-Net's own weights, the rest as it is."""
    if next(unet.parameters()).untyped_storage().nbytes() == 0:
        raise UserError(
            f"{path}: a control-lora needs the U-Net's weights in memory: draw without --max-memory"
        )
    network = build_empty({**_base_of(unet), **hint_shape(tensors)}, path)
    assert isinstance(network, ControlNet)
    made = layouts.control_lora_of(tensors, path, network, dict(unet.named_parameters()))
    return fill(network, made, path, dtype)


READERS: Mapping[str, Callable[[Tensors, Path, UNet, torch.dtype], AnyControl]] = {
    r"^lora_controlnet$": _low_rank,
    r"^lllite_unet": _lllite,
    r"zero_convs\.": _original,
    r"^controlnet_down_blocks\.": _diffusers,
    r"^(adapter\.)?body\.0\.": _adapter,
}


def _base_of(unet: UNet) -> dict[str, Any]:
    """The config of a ControlNet for a U-Net."""
    return ControlNet.written(ControlNetConfig.of(unet.config))


def _check_text(width: int, path: Path, unet: UNet) -> None:
    """Raise UserError for a ControlNet that reads another model's text."""
    if width not in unet.config.per_level("cross_attention_dim"):
        raise refuse(path, "a ControlNet", family_named(width), unet)
