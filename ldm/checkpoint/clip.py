"""transformers' CLIP text encoder and tokenizer on disk.

transformers is imported where it is used: it costs a second and a half.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.fill import check_names
from ldm.checkpoint.io import fill, read_bytes, read_config, read_json
from ldm.checkpoint.keymap import text_keys
from ldm.checkpoint.parts import TEXT_STEM
from ldm.checkpoint.weights import open_stored
from ldm.errors import UserError

CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
# Keys of a config and their values where it is silent, as in transformers.
SIZES = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "projection_dim": 512,
}


def load_text_encoder(folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    """The text encoder in `folder`, in `dtype` or as stored, mapped from the file. Raises UserError."""
    stored = open_stored(folder, TEXT_STEM, variant)
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
    name = check_text_encoder(config, tensors, path)
    from transformers.models.clip import configuration_clip, modeling_clip

    try:
        with torch.device("meta"):
            model = getattr(modeling_clip, name)(configuration_clip.CLIPTextConfig.from_dict(dict(config)))
    except Exception as error:  # transformers raises whatever it likes at odd values
        reason = str(error).splitlines()[0]
        raise UserError(f"{_config_of(path)}: not the config of a {name} ({reason})") from None
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


def check_text_encoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> str:
    """The name of a text encoder's class; arguments as above. At once: without transformers.

    Raises:
        UserError: for another class, sizes that cannot be, and tensors that are not those of the config.
    """
    name, wanted = wanted_tensors(config, tensors, path)
    stored = {key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}
    if not any(key.startswith("text_model.") for key in stored):
        wanted = {key.removeprefix("text_model."): tensor for key, tensor in wanted.items()}
    check_names(wanted, stored, path)
    return name


def wanted_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[str, dict[str, Tensor]]:
    """A text encoder's class, and its tensors by their names, on the meta device. Raises UserError."""
    name: str = (config.get("architectures") or [CLASSES["text_projection.weight" in tensors]])[0]
    if name not in CLASSES:
        raise UserError(f"{_config_of(path)}: a {name}; only {' or '.join(CLASSES)} can be read")
    sizes = read_sizes(config, _config_of(path))
    keys = text_keys({**config, "architectures": [name]}, open_clip=False)
    return name, {key.original: _empty(key.original, sizes) for key in keys}


def read_sizes(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The SIZES of a config, which `path` holds. Raises UserError for those that cannot be."""
    sizes = {key: config.get(key, default) for key, default in SIZES.items()}
    for key, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path}: {key} = {size!r} is not allowed: give a whole number")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(
            f"{path}: hidden_size = {sizes['hidden_size']} cannot be shared out among "
            f"num_attention_heads = {sizes['num_attention_heads']}"
        )
    return sizes


def _empty(name: str, sizes: Mapping[str, int]) -> Tensor:
    """A tensor of a text encoder, on the meta device."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {
        "token_embedding.weight": (sizes["vocab_size"], width),
        "position_embedding.weight": (sizes["max_position_embeddings"], width),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "_proj.weight": (width, width),
        "text_projection.weight": (sizes["projection_dim"], width),
    }
    found = (shape for end, shape in shapes.items() if name.endswith(end))
    return torch.empty(next(found, (width,)), device="meta")


def _config_of(path: Path) -> Path:
    """The file that a text encoder's config is from: beside its weights, or the single file itself."""
    beside = path.parent / "config.json"
    return beside if beside.exists() else path


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer, of vocab.json and merges.txt or of tokenizer.json. Raises UserError."""
    check_tokenizer(folder)
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # as above
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not the files of a CLIPTokenizer ({reason}); fetch them again") from None


def check_tokenizer(folder: Path) -> None:
    """Raises UserError for files that are missing or damaged. At once: without transformers."""
    single, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if single.exists():
        read_json(single)
    else:
        read_json(folder / "vocab.json")
        _check_merges(folder)
    if config.exists() or not single.exists():
        length = read_config(config).get("model_max_length", 77)
        if not isinstance(length, int | float) or length < 3:
            raise UserError(f"{config}: model_max_length = {length!r} is not allowed: give at least 3")


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
