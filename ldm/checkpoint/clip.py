"""transformers' CLIP text encoder and tokenizer on disk.

transformers is imported where it is used: it costs a second and a half.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.io import (
    fill,
    read_bytes,
    read_config,
    read_json,
)
from ldm.checkpoint.weights import open_stored
from ldm.errors import UserError

STEM = "model"


def load_text_encoder(folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    """The text encoder in `folder`, in `dtype` or as stored, mapped from the file. Raises UserError."""
    stored = open_stored(folder, STEM, variant)
    return make_text_encoder(stored.config, stored.tensors, stored.path, dtype)


def make_text_encoder(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None
) -> Any:
    """transformers' CLIPTextModel or CLIPTextModelWithProjection, as `architectures` of its config says.

    Args:
        config: a `config.json`; without `architectures` the tensors tell which it is.
        tensors: by transformers' names, with or without the `text_model.` prefix.
        path: where they were read from, for messages.

    Raises:
        UserError: if config and tensors do not belong together.
    """
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    classes = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    silent = "CLIPTextModelWithProjection" if "text_projection.weight" in tensors else "CLIPTextModel"
    name = (config.get("architectures") or [silent])[0]
    if name not in classes:
        raise UserError(f"{path.parent / 'config.json'}: a {name}; only {' or '.join(classes)} can be read")
    try:
        with torch.device("meta"):
            model = classes[name](CLIPTextConfig.from_dict(dict(config)))
    except Exception as error:  # transformers raises whatever it likes at odd values
        reason = str(error).splitlines()[0]
        raise UserError(f"{path.parent / 'config.json'}: not the config of a {name} ({reason})") from None
    prefix = "text_model." if hasattr(model, "text_model") else ""
    named = {
        (prefix if "text_projection" not in key else "") + key.removeprefix("text_model."): tensor
        for key, tensor in tensors.items()
        if not key.endswith("position_ids")
    }
    fill(model, named, path, dtype)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # not stored, so it is still on the meta device
            positions = torch.arange(model.config.max_position_embeddings)[None]
            module.register_buffer("position_ids", positions, persistent=False)
    return model


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer, of vocab.json and merges.txt or of tokenizer.json. Raises UserError."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    single, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if single.exists():
        read_json(single)
    else:
        read_json(folder / "vocab.json")
        _check_merges(folder)
    if config.exists() or not single.exists():
        read_config(config)
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # as above
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not the files of a CLIPTokenizer ({reason}); fetch them again") from None


def _check_merges(folder: Path) -> None:
    """A merges.txt that is cut short would silently give other tokens."""
    path = folder / "merges.txt"
    lines = read_bytes(path).decode("utf-8", "replace").splitlines()
    made = {line.replace(" ", "") for line in lines}
    long = (token for token in read_json(folder / "vocab.json") if len(token.removesuffix("</w>")) > 1)
    lost = [token for token in long if token not in made and not token.startswith("<|")]
    if lost:
        raise UserError(
            f"{path}: damaged or cut short ({lost[0]!r} is not made by any merge); fetch it again"
        )
