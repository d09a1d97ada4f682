"""One network of a model: of a folder of its own, or of a file in the original layout or diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.clip import build_empty_text, load_text_encoder
from ldm.checkpoint.fill import check_names, fill, reshape, unfilled
from ldm.checkpoint.io import read_tensors
from ldm.checkpoint.keymap import Key, from_original, module_keys, text_keys
from ldm.checkpoint.original.sections import section_of
from ldm.checkpoint.original.shapes import Tensors, is_open_clip, shape_of
from ldm.checkpoint.parts import MODEL_STEM, TEXT_ENCODERS
from ldm.checkpoint.weights import Stored, check_counts, open_stored
from ldm.errors import UserError, abbreviate
from ldm.models import Network, build
from ldm.models.clip import CLIPTextModel
from ldm.runtime import Runtime

# Names that diffusers gave the VAE's attention before 0.15; Stable Diffusion 1.5 is stored with them.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What diffusers' `fuse_qkv_projections` writes in one, most often beside what it made it of.
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
# Inside: the VAE's discriminator; buffers, and heads for other tasks.
UNUSED_IN_VAE = re.compile(r"(loss|model_ema)\..*|logvar")
UNUSED_IN_TEXT = re.compile(r"(.*\.)?position_ids|logit_scale|attn_mask|text_projection(\.weight)?")


def dtype_of(part: str, config: Mapping[str, Any], runtime: Runtime | None) -> torch.dtype | None:
    """What a part with this config is loaded in; None, as stored, without a runtime."""
    if runtime is None:
        return None
    return runtime.vae_dtype(config.get("force_upcast", True)) if part == "vae" else runtime.dtype


# --- with diffusers' names ----------------------------------------------------------------------------------


def load_module(folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Network:
    """The U-Net or VAE in `folder`, in `dtype` or as stored, mapped from the file. Raises UserError."""
    stored = open_stored(folder, MODEL_STEM, variant)
    return fill(build_stored(stored), named(stored), stored.path, dtype)


def build_empty(config: Mapping[str, Any], path: Path) -> Network:
    """The module of a config, which is from `path`, on the meta device. Raises UserError."""
    try:
        with unfilled():
            return build(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def build_stored(stored: Stored) -> Network:
    """The module of a config, on the meta device; the tensors fit it. Raises UserError."""
    module = build_empty(stored.config, stored.path.parent / "config.json")
    check_names(module.state_dict(), named(stored), stored.path)
    return module


def named(stored: Stored) -> dict[str, Tensor]:
    """The tensors by their names in today's modules."""
    return with_new_names(stored.tensors)


def with_new_names(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors by the names in today's modules; fused projections are split, or left if their parts are there.

    As in diffusers, which reads the parts and never what they were fused to.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, _, kind = name.rpartition(".")
        before, _, layer = head.rpartition(".")
        if layer in FUSED:
            parts = [f"{before}.{part}.{kind}" for part in FUSED[layer]]
            split = zip(parts, tensor.chunk(len(parts)), strict=False)
            renamed |= {part: own for part, own in split if part not in tensors}
        else:
            renamed[new_name(name)] = tensor
    return renamed


def new_name(name: str) -> str:
    """mid_block.attentions.0.query.weight -> mid_block.attentions.0.to_q.weight."""
    head, _, kind = name.rpartition(".")
    before, _, layer = head.rpartition(".")
    return f"{before}.{OLD_ATTENTION[layer]}.{kind}" if layer in OLD_ATTENTION else name


# --- in the original layout ---------------------------------------------------------------------------------


def load_component(path: Path, part: str, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
    """One part from a file or folder of its own, or from a whole model's file; as stored or in `dtype`.

    Args:
        path: a folder with a config.json, or a file: in the original layout with or without the part's
            prefix, or with diffusers' names.
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        config: of the part that it replaces. Shapes in the file correct it.

    Raises:
        UserError: if the file holds no such part, or not all of it.
    """
    is_text = part in TEXT_ENCODERS
    if path.is_dir():
        return load_text_encoder(path, dtype) if is_text else load_module(path, dtype)
    tensors = read_tensors(path)
    if not is_text and any("down_blocks." in name for name in tensors):
        module = build_empty(config, path)
        tensors = with_new_names(tensors)
        return fill(module, reshape(module.state_dict(), tensors, path), path, dtype)
    prefix, section = section_of(part, tensors, path)
    try:
        shape = shape_of(part, section, config)
    except KeyError as error:
        raise UserError(f"{path}: tensor {prefix}{error.args[0]} is missing; is the file complete?") from None
    except IndexError:
        raise UserError(f"{path}: tensors of its {part} have shapes of no such model") from None
    # Heads are not in shapes: those of the part that it replaces, where that is as wide.
    same = all(shape.get(key) == config.get(key) for key in ("block_out_channels", "hidden_size"))
    heads = {key: config[key] for key in ("attention_head_dim", "num_attention_heads") if key in config}
    if same:
        shape |= heads
    module, _ = load_section(part, {**config, **shape}, section, path, prefix, dtype)
    return module


def load_section(
    part: str,
    config: Mapping[str, Any],
    section: Tensors,
    path: Path,
    prefix: str,
    dtype: torch.dtype | None,
) -> tuple[Any, list[str]]:
    """A part from its tensors in the original layout, and the names in the file of those not used."""
    check_counts(config, section, path)
    module: CLIPTextModel | Network
    if part in TEXT_ENCODERS:
        module = build_empty_text(config, path)
        keys = text_keys(config, is_open_clip(section))
    else:
        module = build_empty(config, path)
        keys = module_keys(module)
    tensors, left = _rename(keys, section, part, config, path, prefix)
    return fill(module, reshape(module.state_dict(), tensors, path), path, dtype), left


def _rename(
    keys: Iterable[Key], section: Tensors, part: str, config: Mapping[str, Any], path: Path, prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """A part's tensors by the names in its module. Raises UserError naming those missing or unknown."""
    wanted = {key.original for key in keys}
    left = [name for name in section if name not in wanted]
    unknown = [name for name in left if not _is_unused(part, config, name)]
    refuse("missing", [prefix + name for name in wanted - section.keys()], path)
    refuse("not of this model", [prefix + name for name in unknown], path)
    return from_original(keys, section), [prefix + name for name in left]


def _is_unused(part: str, config: Mapping[str, Any], name: str) -> bool:
    if part == "unet":
        return False
    if part == "vae":
        return UNUSED_IN_VAE.fullmatch(name) is not None
    # SD 2 reads the output of the last layer but one, and leaves the last out of the folder.
    last = f"transformer.resblocks.{config.get('num_hidden_layers', 12)}."
    return name.startswith(last) or UNUSED_IN_TEXT.fullmatch(name) is not None


def refuse(fault: str, names: list[str], path: Path) -> None:
    """Raises UserError naming tensors that are `fault`: missing, unknown."""
    if names:
        raise UserError(f"{path}: tensors {fault}: {abbreviate(sorted(names))}")
