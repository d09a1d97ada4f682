"""transformers' CLIP text encoder and tokenizer on disk.

transformers is imported where it is used: it costs a second and a half.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.io import (
    fill,
    find_weights,
    read_bytes,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from ldm.errors import UserError

STEM = "model"


def load_text_encoder(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """transformers' CLIPTextModel in `folder`, its tensors with or without the `text_model.` prefix."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    config = read_json(folder / "config.json")
    path = find_weights(folder, STEM)
    try:
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig.from_dict(config))
    except Exception as error:  # transformers raises whatever it likes at odd values
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / 'config.json'}: not the config of a CLIPTextModel ({reason})") from None
    prefix = "text_model." if hasattr(model, "text_model") else ""
    tensors = {
        prefix + name.removeprefix("text_model."): tensor
        for name, tensor in read_tensors(path).items()
        if not name.endswith("position_ids")
    }
    fill(model, tensors, path)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # not stored, so it is still on the meta device
            positions = torch.arange(model.config.max_position_embeddings)[None]
            module.register_buffer("position_ids", positions, persistent=False)
    return model.to(dtype)


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer, of vocab.json and merges.txt or of tokenizer.json. Raises UserError."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    single = folder / "tokenizer.json"
    for path in (single,) if single.exists() else (folder / "vocab.json", folder / "tokenizer_config.json"):
        read_json(path)
    if not single.exists():
        _check_merges(folder)
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


def save_text_encoder(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a CLIPTextModel with the `text_model.` prefix, which every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_diff_dict() | {"architectures": ["CLIPTextModel"]}
    write_json(folder / "config.json", json.loads(json.dumps(config, default=str)))
    tensors: dict[str, Tensor] = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in model.state_dict().items()
    }
    write_tensors(folder / f"{STEM}.safetensors", tensors, dtype)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, which every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    write_json(folder / "vocab.json", bpe["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.model_max_length,
    }
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        config[name] = str(getattr(tokenizer, name))
    write_json(folder / "tokenizer_config.json", config)
