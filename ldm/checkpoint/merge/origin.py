"""What a merged model was made of, in the headers of its files: written, read and told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.io import read_metadata, weight_files
from ldm.checkpoint.merge.mixing import Mix
from ldm.checkpoint.parts import NETWORKS, STEMS, Parts
from ldm.checkpoint.weights import find_weights
from ldm.errors import UserError
from ldm.files import sha256
from ldm.version import __version__

# Keys of the header, which AUTOMATIC1111's merger began and other programs show: what was done, and to what.
RECIPE, MODELS = "sd_merge_recipe", "sd_merge_models"


@dataclass(frozen=True)
class Source:
    """One of the models: as it was given, where it was found, and what it holds, mapped."""

    given: str | Path
    path: Path
    parts: Parts


def origin_of(
    mix: Mix, sources: Sequence[Source], merged: Sequence[str], dtype: torch.dtype | None, vae: Path | None
) -> dict[str, str]:
    """The two entries of the header: what is done, and to which models, by their digests.

    `vae` is where the VAE is from, if not from the first.
    """
    files = [dict(_files(source.path)) for source in sources]
    digests = [sha256(*each.values()) for each in files]
    recipe: dict[str, Any] = {"type": "ldm", "version": __version__, "models": digests}
    if mix.difference is None:
        recipe |= {"method": "weighted sum", "weights": list(mix.weights)}
    else:
        recipe |= {"method": "add difference", "multiplier": mix.difference}
    if mix.blocks:
        recipe["block_weights"] = dict(mix.blocks)
    recipe |= {"parts": list(merged), "dtype": None if dtype is None else str(dtype)[6:]}
    models: dict[str, Any] = {}
    for source, digest, own in zip(sources, digests, files, strict=True):
        before = {key: _parsed(text) for key, text in read_origin(source.path).items()}
        models |= before.get(MODELS) or {}
        name = source.path.name if Path(source.given).exists() else str(source.given)
        models[digest] = {"name": name, "files": _digests(own), RECIPE: before.get(RECIPE)}
    if vae is not None:
        own = _weights(vae, "vae") if vae.is_dir() else {vae.name: vae}
        recipe["vae"] = digest = sha256(*own.values())
        models[digest] = {"name": vae.name, "files": _digests(own), RECIPE: None}
    return {RECIPE: json.dumps(recipe), MODELS: json.dumps(models)}


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: sha256(file) for name, file in files.items()}


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """A model's files of weights, by their names in it."""
    if not path.is_dir():
        yield path.name, path
        return
    for part in NETWORKS:
        if (path / part).is_dir():
            for name, file in _weights(path / part, part).items():
                yield f"{part}/{name}", file


def _weights(folder: Path, part: str) -> dict[str, Path]:
    """The files of a part's own folder."""
    files = weight_files(find_weights(folder, STEMS[part], log=lambda _: None))
    return {file.name: file for file in files}


def read_origin(path: Path) -> dict[str, str]:
    """Of a merged model, a file or a folder, what its header says it was made of; nothing of others.

    Raises UserError if it cannot be read.
    """
    file = next(iter(_weights(path / "unet", "unet").values())) if path.is_dir() else path
    metadata = read_metadata(file)
    return {key: metadata[key] for key in (RECIPE, MODELS) if key in metadata}


def _parsed(text: str) -> dict[str, Any] | None:
    """The JSON object, which any program may have written; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def tell(path: Path) -> list[str]:
    """What a merged model was made of, in lines for people. Raises UserError for one that does not say it."""
    origin = read_origin(path)
    recipe, models = (_parsed(origin.get(key, "")) for key in (RECIPE, MODELS))
    if recipe is None:
        raise UserError(f"{path}: does not say that it was merged")
    lines = [f"{key}: {_in_words(value)}" for key, value in recipe.items() if value is not None]
    for digest, model in (models or {}).items():
        name = model.get("name") if isinstance(model, dict) else None
        lines.append(f"model {digest}: {name}")
    return lines


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
