"""CLIP's text encoder on disk, in transformers' names, with their `text_model.` or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.fill import check_names, fill, unfilled
from ldm.checkpoint.parts import TEXT_STEM
from ldm.checkpoint.weights import open_stored
from ldm.errors import UserError
from ldm.models.clip import CLASSES, CLIPTextModel

PREFIX = "text_model."  # transformers from 5.6 on leaves it out of what it calls CLIPTextModel


def load_text_encoder(
    folder: Path, dtype: torch.dtype | None = None, variant: str | None = None
) -> CLIPTextModel:
    """The text encoder in `folder`, in `dtype` or as stored, mapped from the file. Raises UserError."""
    stored = open_stored(folder, TEXT_STEM, variant)
    return make_text_encoder(stored.config, stored.tensors, stored.path, dtype)


def make_text_encoder(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None
) -> CLIPTextModel:
    """The text encoder of a config, filled with the tensors; see `empty_text_encoder`."""
    return fill(empty_text_encoder(config, tensors, path), with_prefix(tensors), path, dtype)


def empty_text_encoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> CLIPTextModel:
    """A text encoder on the meta device, which the tensors fit.

    Args:
        config: a `config.json`; without `architectures` the tensors tell which class it is.
        tensors: by transformers' names.
        path: where they were read from, for messages.

    Raises:
        UserError: for another class, sizes that cannot be, and tensors that are not those of the config.
    """
    names = config.get("architectures") or [CLASSES["text_projection.weight" in tensors]]
    beside = path.parent / "config.json"
    model = build_empty_text({**config, "architectures": names}, beside if beside.exists() else path)
    cut = "" if any(name.startswith(PREFIX) for name in tensors) else PREFIX  # as the file has it
    wanted, found = (
        {name.removeprefix(cut): tensor for name, tensor in each.items()}
        for each in (model.state_dict(), with_prefix(tensors))
    )
    check_names(wanted, found, path)
    return model


def build_empty_text(config: Mapping[str, Any], path: Path) -> CLIPTextModel:
    """The text encoder of a config, which is from `path`, on the meta device. Raises UserError."""
    try:
        with unfilled():
            return CLIPTextModel.from_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in our module, whichever version stored them; without `position_ids`."""
    return {
        name if name.startswith((PREFIX, "text_projection.")) else PREFIX + name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }
