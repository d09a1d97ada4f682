"""LoRA files and their kin: read, matched to a model layer by layer, and told of.

A file that does not belong to the model is an error that says why: nothing is left out silently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.deltas import Delta, make_delta
from ldm.adapters.inversion import Embedding, read_bundled
from ldm.adapters.names import (
    UNET,
    Layer,
    find_layers,
    is_text,
    list_layers,
    other_kind,
    split_name,
    split_word,
    width_of_text,
)
from ldm.checkpoint import Parts
from ldm.checkpoint.fill import is_finite, widen
from ldm.checkpoint.io import read_json, read_metadata, read_tensors
from ldm.errors import UserError, abbreviate
from ldm.files import sha256

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "the SDXL refiner"}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An adapter file as read: tensors mapped, all of them finite and of known roles."""

    path: Path
    sha256: str
    layers: Mapping[str, Mapping[str, Tensor]]  # by stem, then by role
    settings: Mapping[str, Any]  # peft's config, where the file or its folder has one
    words: tuple[Embedding, ...] = ()  # textual inversions that were trained with it

    @property
    def name(self) -> str:
        """What tags and requests call it: the file's name, or its folder's where the file's is everyone's."""
        return name_of(self.path)


@dataclass(frozen=True, eq=False)
class Lora:
    """A file, the name it goes by, and how strongly it acts: 0 not at all, 1 as trained."""

    file: LoraFile
    name: str
    weight: float = 1.0  # on the U-Net
    text_weight: float = 1.0  # on the text encoders


@dataclass(frozen=True)
class Report:
    """What an adapter file changed. Each pair: tensors matched, tensors that the file has for that part."""

    name: str
    kinds: tuple[str, ...]  # "LoRA", "LoHa", ...
    unet: tuple[int, int]
    text: tuple[int, int]
    layers: int  # changed, in all parts
    weight: float
    text_weight: float
    words: tuple[str, ...] = ()  # that it brings, as prompts write them

    def __str__(self) -> str:
        parts = (("U-Net", self.unet, self.weight), ("text", self.text, self.text_weight))
        parts_matched = [
            f"{part} {n} of {m} tensors (weight {weight:g})" for part, (n, m), weight in parts if m
        ]
        words = f"; for what it learnt, write {', '.join(self.words)} in the prompt" if self.words else ""
        return f"{self.name}: {' and '.join(self.kinds)}, matched {', '.join(parts_matched)}{words}"


def name_of(path: Path) -> str:
    """What an adapter file is called."""
    return path.resolve().parent.name if path.name in FOLDER_FILES else path.stem


# --- reading ---------------------------------------------------------------------------------------------


def read_lora(path: str | Path) -> LoraFile:
    """An adapter file, or the folder that diffusers or peft saved one to. Read again only if it has changed.

    Raises:
        UserError: if it is missing, damaged, no adapter, or holds NaN.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).exists()), path / FOLDER_FILES[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a LoRA")
    state = path.stat()
    return _read(path.resolve(), path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _read(_key: Path, path: Path, _mtime_ns: int, _size: int) -> LoraFile:
    layers: dict[str, dict[str, Tensor]] = {}
    words: dict[str, dict[str, Tensor]] = {}
    adapters: dict[str, None] = {}  # peft's names, in order
    strange = []
    for key, stored in read_tensors(path).items():
        tensor = widen(stored)
        if not is_finite(tensor):
            raise UserError(f"{path}: tensor {key} has NaN or Inf; this file is damaged, fetch it again")
        if word := split_word(key):
            words.setdefault(word[0], {})[word[1]] = tensor
        elif (name := split_name(key)) is None:
            strange.append(key)
        else:
            layers.setdefault(name.stem, {})[name.role] = tensor
            adapters |= {name.adapter: None} if name.adapter else {}
    if strange or not layers:
        raise UserError(f"{path}: {_fault(strange, layers)}")
    if len(adapters) > 1:
        raise UserError(
            f"{path}: holds {len(adapters)} adapters, {' and '.join(adapters)}, and does not say which is "
            "meant:\nsave each to a file of its own"
        )
    bundled = tuple(read_bundled(path, word, content) for word, content in words.items())
    return LoraFile(path, sha256(path), layers, _read_settings(path), bundled)


def _fault(strange: list[str], layers: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Why a file is not read: names that none of its tensors should have, or no layers."""
    if kind := other_kind(strange):
        return (
            f"has tensors of {kind} ({abbreviate(strange)}), which is not supported:\n"
            "LoRA, LoHa, LoKr, DoRA and differences are; programs that draw with it can merge it into a model"
        )
    if layers:
        return f"has tensors that no LoRA, LoHa, LoKr or DoRA has: {abbreviate(strange)}"
    return (
        f"has no LoRA, LoHa, LoKr or DoRA tensors ({abbreviate(strange) or 'it changes no layer'}): "
        "a LoRA is expected here,\n"
        "not a whole model, a ControlNet or a textual inversion (give those by --embedding)"
    )


def _read_settings(path: Path) -> Mapping[str, Any]:
    """peft's config: in the file's header (diffusers), or beside the file (peft)."""
    beside = path.with_name("adapter_config.json")
    header = read_metadata(path).get("lora_adapter_metadata")
    if header is None:
        return read_json(beside) if path.stem == "adapter_model" and beside.exists() else {}
    try:
        settings = json.loads(header)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: its lora_adapter_metadata is not a JSON object; fetch it again")
    return settings


# --- matching --------------------------------------------------------------------------------------------


def match(lora: Lora, parts: Parts) -> tuple[dict[Layer, Delta], Report]:
    """Every layer that a file changes, and the report of it. Nothing is computed yet.

    Raises:
        UserError: if it was made for another family, if no or not all tensors belong to this model, if
            tensors of a layer are missing or of different ranks, or if they do not fit the layer.
    """
    file = lora.file
    layers = find_layers(parts, file.layers)
    _check_family(file, parts)
    report = _report(lora, layers)
    if len(layers) < len(file.layers):
        _complain(file, layers, report)
    modules, deltas = list_layers(parts), {}
    for layer, (stem, tensors) in _by_layer(file, layers).items():
        try:
            deltas[layer] = make_delta(tensors, _scale(file.settings, layer))
            deltas[layer].check(modules[layer])
        except UserError as error:
            raise UserError(f"{file.path}: {stem}: {error}") from None
    kinds = {("DoRA" if delta.magnitude is not None else "") or delta.kind for delta in deltas.values()}
    return deltas, Report(kinds=tuple(sorted(kinds)), **report)


def _by_layer(file: LoraFile, layers: Mapping[str, Layer]) -> dict[Layer, tuple[str, Mapping[str, Tensor]]]:
    """The tensors of each layer by role, and a stem that means it.

    Some files have a layer in two spellings, so that every program finds one: that is the same twice. Raises
    UserError if it is not the same.
    """
    found: dict[Layer, tuple[str, Mapping[str, Tensor]]] = {}
    for stem, layer in layers.items():
        tensors = file.layers[stem]
        first, known = found.get(layer, (stem, {}))
        if known.keys() & tensors.keys() and not _are_same(known, tensors):
            raise UserError(
                f"{file.path}: has {layer} twice, in two spellings, and not the same: {first} and {stem}"
            )
        found[layer] = (first, {**known, **tensors})
    return found


def _are_same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(tensor.flatten(), two[role].flatten()) for role, tensor in one.items()
    )


def _report(lora: Lora, layers: Mapping[str, Layer]) -> dict[str, Any]:
    counts = {True: [0, 0], False: [0, 0]}  # text or not: matched, all
    for stem, tensors in lora.file.layers.items():
        text = layers[stem].part != UNET if stem in layers else is_text(stem)
        counts[text][1] += len(tensors)
        counts[text][0] += len(tensors) * (stem in layers)
    return {
        "name": lora.name,
        "unet": tuple(counts[False]),
        "text": tuple(counts[True]),
        "layers": len({*layers.values()}),
        "weight": lora.weight,
        "text_weight": lora.text_weight,
        "words": tuple(word.name for word in lora.file.words),
    }


def _complain(file: LoraFile, layers: Mapping[str, Layer], report: Mapping[str, Any]) -> None:
    lost = abbreviate([stem for stem in file.layers if stem not in layers])
    (unet, unets), (text, texts) = report["unet"], report["text"]
    raise UserError(
        f"{file.path}: only {unet} of {unets} U-Net tensors and {text} of {texts} text tensors belong to "
        f"this model; it has no {lost}.\nThis adapter was made for a model of another shape."
    )


def _check_family(file: LoraFile, parts: Parts) -> None:
    """Cross-attention's keys and values take text: their input's width tells what a file was trained on."""
    ours = width_of_text(parts)
    for stem, tensors in file.layers.items():
        if re.search(r"attn2[._](processor\.)?to[._][kv]$", stem):
            first = next((tensors[role] for role in ("down", "hada_w1_b", "diff") if role in tensors), None)
            if first is not None and first.ndim > 1 and first.shape[1] != ours:
                raise UserError(
                    f"{file.path}: made for {family_of(first.shape[1])}; this model is {family_of(ours)}.\n"
                    "An adapter works only with the family that it was trained on."
                )


def family_of(width: int) -> str:
    """A model's family, by the width of the text that it reads."""
    return f"{FAMILIES.get(width, 'a model')} with text of {width} channels"


def _scale(settings: Mapping[str, Any], layer: Layer) -> float | None:
    """alpha / rank (or its root, rsLoRA) as peft's config says; None if there is no config for that part."""
    own = {key.removeprefix(f"{layer.part}."): value for key, value in settings.items()}
    alpha, rank = own.get("lora_alpha", own.get("alpha")), own.get("r")
    try:
        alpha = _by_pattern(own.get("alpha_pattern"), layer.path, alpha)
        rank = _by_pattern(own.get("rank_pattern"), layer.path, rank)
        if alpha is None or rank is None:
            return None
        alpha, rank = float(alpha), float(rank)
        scale: float = alpha / rank ** (0.5 if own.get("use_rslora") else 1.0)
        if rank >= 1 and math.isfinite(scale):
            return scale
        raise ValueError
    except (ArithmeticError, TypeError, ValueError, AttributeError, re.error):
        raise UserError(f"its config says alpha {alpha!r} and rank {rank!r}, which cannot be") from None


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """As peft does: a pattern is a regular expression for the end of a module's name.

    Raises ValueError for one that could take for ever: quantified groups, or many wildcards.
    """
    if any(re.search(r"\)[*+?{]", key) or len(re.findall("[*+{]", key)) > 3 for key in patterns or {}):
        raise ValueError
    found = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", path))
    return next(found, default)
