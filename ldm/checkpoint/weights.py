"""A network's folder: its config.json, and which of the files beside it holds the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from ldm.checkpoint.io import read_config, read_tensors
from ldm.errors import UserError, abbreviate

# What weights are called, by the library that writes them: as safetensors and as a pickle.
STEMS = {
    "diffusion_pytorch_model": "diffusion_pytorch_model",  # diffusers: U-Net and VAE
    "model": "pytorch_model",  # transformers: text encoders
}


WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".ema")
# Of other frameworks, and of training: they lie in many folders, and nobody expects them to be read.
ELSEWHERE = re.compile(r"(flax_model|tf_model|openvino_|training_args|optimizer|scheduler|random_states).*")


def warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)


@dataclass(frozen=True)
class Stored:
    """A network on the disk: found and checked as far as that goes without reading the weights."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]  # mapped
    path: Path  # of the weights: a file, or the index of several


def open_stored(
    folder: Path,
    stem: str,
    variant: str | None = None,
    *,
    needed: bool = False,
    log: Callable[[str], object] = warn,
) -> Stored:
    """The network in `folder`. Arguments as in `choose_weights`; `log` is given what may surprise.

    Raises UserError.
    """
    config = read_config(folder / "config.json")
    path = find_weights(folder, stem, variant, needed=needed, log=log)
    if unread := unread_weights((each.name for each in folder.iterdir()), stem, path.name):
        log(
            f"{folder}: not read: {abbreviate(unread)}, since {path.name} holds the weights: rename the one "
            "that is meant, or move the others away"
        )
    tensors = read_tensors(path)
    check_counts(config, tensors, folder / "config.json")
    return Stored(config, tensors, path)


def check_counts(config: Mapping[str, Any], tensors: Collection[str], path: Path) -> None:
    """Raises UserError for a config, in `path`, of more layers than there are tensors, which none can be."""
    for key, value in config.items():
        if isinstance(value, int | list | tuple) and re.search("layers|_blocks$", key):
            most = max(_numbers(value), default=0)
            if most > len(tensors):
                raise UserError(f"{path}: {key} = {most}, but the weights have only {len(tensors)} tensors")


def _numbers(value: Any) -> Iterator[float]:
    """Those in nested lists."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value


def find_weights(
    folder: Path,
    stem: str,
    variant: str | None = None,
    *,
    needed: bool = False,
    log: Callable[[str], object] = warn,
) -> Path:
    """The weights in `folder`, as `choose_weights` says; it is said where another variant is taken."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    chosen = choose_weights(names, folder, stem, variant, needed=needed)
    if list_weights(names, stem).get(variant or "") != chosen:
        missing = f"no variant {variant!r}" if variant else "no plain file"
        log(f"{folder}: {missing}, so {chosen} is read")
    return folder / chosen


def unread_weights(names: Iterable[str], stem: str, chosen: str) -> list[str]:
    """Files of weights that someone may believe to be read.

    Not those that are another form or variant of the chosen ones, as most folders on the hub have them; but
    averages are, which some programs write beside them.
    """
    shard = r"(-\d+-of-\d+)?"
    same = re.compile(rf"({stem}|{STEMS[stem]}){shard}(\.(?!ema\b)\w+{shard})?\.(safetensors|bin)")
    return sorted(
        name
        for name in names
        if name.lower().endswith(WEIGHTS)
        and name != chosen
        and not same.fullmatch(name)
        and not ELSEWHERE.match(name)
    )


def choose_weights(
    names: Iterable[str], folder: PurePath, stem: str, variant: str | None = None, *, needed: bool = False
) -> str:
    """The file of weights among all that are in a folder: safetensors before a pickle.

    Args:
        stem: "diffusion_pytorch_model" or "model"; the names of pickles follow from it.
        variant: such as "fp16", of `stem`.fp16.safetensors. Where it is not there, the plain file is taken,
            and without it the only variant there is.
        needed: no other than the variant will do.

    Raises:
        UserError: that says what is there instead.
    """
    names = sorted(names)
    found = list_weights(names, stem)
    asked = variant or ""
    if asked in found:
        return found[asked]
    if (variant and needed) or (len(found) != 1 and "" not in found):
        file = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        raise UserError(f"{folder / file}: no such file{_instead(names, found)}")
    return found.get("") or next(iter(found.values()))


def list_weights(names: Iterable[str], stem: str) -> dict[str, str]:
    """The file of each variant, "" being the plain one: safetensors before a pickle, whole before sharded."""
    found: dict[str, str] = {}
    for file in (f"{STEMS[stem]}@.bin", f"{stem}@.safetensors"):
        for form in (f"{file.replace('@', '')}.index@.json", file):
            before, after = (re.escape(half) for half in form.split("@"))
            matches = (re.fullmatch(rf"{before}(?:\.(\w+))?{after}", name) for name in names)
            found |= {match[1] or "": match[0] for match in matches if match}
    return found


def _instead(names: Iterable[str], found: dict[str, str]) -> str:
    if len(found) > 1 and "" not in found:
        return f", only the variants {', '.join(sorted(found))}: say which (--variant)"
    others = [name for name in names if name.lower().endswith((".bin", ".safetensors", ".msgpack", ".onnx"))]
    return f"; found only {', '.join(others)}" if others else "; is the download complete?"
