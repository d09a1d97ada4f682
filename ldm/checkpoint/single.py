"""A model in one file, in the original layout of CompVis and Stability: read strictly, offline.

    file -> parts (`sections`) -> configs (`detect`) -> names (`keymap`) -> modules

Every tensor of a file is used, or of a kind that is known not to matter, or an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.clip import load_text_encoder, load_tokenizer, make_text_encoder, read_sizes
from ldm.checkpoint.detect import OPTIONS, Detected, detect, own_configs
from ldm.checkpoint.fit import check_fit
from ldm.checkpoint.folder import MODEL_STEM, Parts, build_empty, dtype_of, load_module, new_name
from ldm.checkpoint.io import fill, read_json, read_tensors
from ldm.checkpoint.keymap import Key, from_original, module_keys, text_keys
from ldm.checkpoint.sections import TEXT, Single, open_single, prefixes, section_of
from ldm.checkpoint.shapes import Tensors, is_open_clip, shape_of
from ldm.checkpoint.tokenizer import make_tokenizer
from ldm.checkpoint.weights import check_counts, find_weights
from ldm.errors import UserError, few
from ldm.runtime import Runtime
from ldm.schedule import Schedule

Say = Callable[[str], object]

# Tensors that nothing is drawn with. Outside the parts: schedules, which the config has, and what training
# left.
UNUSED = re.compile(
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?(alphas_cumprod(_prev)?|betas)|posterior_\w+|lvlb_weights|"
    r"logvar|scale_factor|denoiser\.(log_)?sigmas|(low_scale_model|model_ema|embedding_manager)\..*|"
    r"(cond_stage_model|conditioner\.embedders\.\d)\.(logit_scale|text_projection(\.weight)?)"
)
MARKS = ("v_pred", "ztsnr")
# Inside: the VAE's discriminator; buffers, and heads for other tasks.
UNUSED_IN_VAE = re.compile(r"(loss|model_ema)\..*|logvar")
UNUSED_IN_TEXT = re.compile(r"(.*\.)?position_ids|logit_scale|attn_mask|text_projection(\.weight)?")


def load_single(
    path: Path,
    runtime: Runtime | None,
    *,
    prediction_type: str | None = None,
    ema: bool | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Path] | None = None,
    say: Say = print,
) -> Parts:
    """The model in a .safetensors, .ckpt or .pt file of the original layout, on the runtime's device.

    Args:
        prediction_type: "epsilon" or "v_prediction", where the file does not say it or is wrong.
        ema: take the averaged weights (True) or the plain ones (False) of a file that holds both. By default
            the plain ones, as every other program does: in merged and fine-tuned files the average is often
            still that of the model they began from.
        config: a pipeline folder whose configs and tokenizers are taken instead of the family's.
        overrides: by part ("unet", "vae", "text_encoder", "text_encoder_2"), the file or folder to take.
        say: is given a line for each thing that was guessed.

    Raises:
        UserError: naming the tensor or part that is missing or does not belong, and what to do.
    """
    parts, _ = read_single(
        path, runtime, prediction_type=prediction_type, ema=ema, config=config, overrides=overrides, say=say
    )
    if runtime is None:
        return parts
    placed: dict[str, Any] = {
        part: runtime.place(module)
        for part in ("unet", "text_encoder", "text_encoder_2")
        if (module := getattr(parts, part)) is not None
    }
    vae = runtime.place(parts.vae, runtime.vae_dtype(parts.vae.config.force_upcast))
    return replace(parts, vae=vae, **placed)


def read_single(
    path: Path,
    runtime: Runtime | None = None,
    *,
    prediction_type: str | None = None,
    ema: bool | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Path] | None = None,
    say: Say = print,
) -> tuple[Parts, list[str]]:
    """As `load_single`, but on the CPU, as stored without a runtime; and the names of unused tensors."""
    file, overrides = open_single(path, ema), overrides or {}
    given = own_configs(file.metadata, path) | (_read_configs(config) if config else {})
    found = detect(file, given, prediction_type)
    Schedule.from_config(dict(found.configs["scheduler"]))
    _check_complete(file, overrides)
    unused = _unused_outside(file)
    for note in (*file.notes, *found.notes):
        say(f"{path.name} ({found.title}): {note}")
    modules: dict[str, Any] = {}
    for part, prefix in prefixes(file.family).items():
        configured = found.configs[part]
        dtype = dtype_of(part, configured, runtime)
        if part in overrides:
            modules[part] = load_component(overrides[part], part, configured, dtype)
        else:
            modules[part], left = _load(part, configured, file.sections[part], path, prefix, dtype)
            unused += left
    weights = overrides.get("unet", path)
    weights = find_weights(weights, MODEL_STEM) if weights.is_dir() else weights
    parts = _assemble(found, modules, config, weights, path)
    check_fit(parts, {part: overrides.get(part, path) for part in modules})
    return parts, unused


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
    is_text = part in TEXT["sdxl"]
    if path.is_dir():
        return load_text_encoder(path, dtype) if is_text else load_module(path, dtype)
    tensors = read_tensors(path)
    if not is_text and any("down_blocks." in name for name in tensors):
        return fill(
            build_empty(config, path), {new_name(name): t for name, t in tensors.items()}, path, dtype
        )
    prefix, section = section_of(part, tensors, path)
    try:
        shape = shape_of(part, section, config)
    except KeyError as error:
        raise UserError(f"{path}: tensor {prefix}{error.args[0]} is missing; is the file complete?") from None
    # Heads are not in shapes: those of the part that it replaces, where that is as wide.
    same = all(shape.get(key) == config.get(key) for key in ("block_out_channels", "hidden_size"))
    heads = {key: config[key] for key in ("attention_head_dim", "num_attention_heads") if key in config}
    if same:
        shape |= heads
    module, _ = _load(part, {**config, **shape}, section, path, prefix, dtype)
    return module


def _load(
    part: str,
    config: Mapping[str, Any],
    section: Tensors,
    path: Path,
    prefix: str,
    dtype: torch.dtype | None,
) -> tuple[Any, list[str]]:
    """A part from its tensors in the original layout, and the names in the file of those not used."""
    check_counts(config, section, path)
    if part in TEXT["sdxl"]:
        read_sizes(config, path)
        keys = text_keys(config, is_open_clip(section))
        tensors, left = _rename(keys, section, part, config, path, prefix)
        return make_text_encoder(config, tensors, path, dtype), left
    module = build_empty(config, path)
    tensors, left = _rename(module_keys(module), section, part, config, path, prefix)
    return fill(module, tensors, path, dtype), left


def _rename(
    keys: Iterable[Key], section: Tensors, part: str, config: Mapping[str, Any], path: Path, prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """A part's tensors by the names in its module. Raises UserError naming those missing or unknown."""
    wanted = {key.original for key in keys}
    left = [name for name in section if name not in wanted]
    unknown = [name for name in left if not _is_unused(part, config, name)]
    _refuse("missing", [prefix + name for name in wanted - section.keys()], path)
    _refuse("not of this model", [prefix + name for name in unknown], path)
    return from_original(keys, section), [prefix + name for name in left]


def _is_unused(part: str, config: Mapping[str, Any], name: str) -> bool:
    if part == "unet":
        return False
    if part == "vae":
        return UNUSED_IN_VAE.fullmatch(name) is not None
    # SD 2 reads the output of the last layer but one, and leaves the last out of the folder.
    last = f"transformer.resblocks.{config.get('num_hidden_layers', 12)}."
    return name.startswith(last) or UNUSED_IN_TEXT.fullmatch(name) is not None


def _unused_outside(file: Single) -> list[str]:
    """Tensors of no part. Raises UserError naming one that nobody knows."""
    _refuse(
        "unknown", [name for name in file.loose if not (name in MARKS or UNUSED.fullmatch(name))], file.path
    )
    return [name for name in file.loose if name not in MARKS]


def _refuse(fault: str, names: list[str], path: Path) -> None:
    if names:
        raise UserError(f"{path}: tensors {fault}: {few(sorted(names))}")


def _check_complete(file: Single, overrides: Mapping[str, Path]) -> None:
    """A file may leave parts out if others are given. Raises UserError saying what is missing."""
    for part in overrides.keys() - prefixes(file.family).keys():
        raise UserError(f"{file.path}: a model of this family has no {part}: leave {_flag(part)} out")
    missing = [part for part in prefixes(file.family) if part not in {*file.sections, *overrides}]
    if missing:
        flags = " ".join(f"{_flag(part)} FILE" for part in missing)
        raise UserError(
            f"{file.path}: has no {' and no '.join(missing)}; take it from elsewhere with {flags}"
        )


def _flag(part: str) -> str:
    return f"--{part.replace('_', '-')}"


def _read_configs(folder: Path) -> dict[str, Any]:
    """The configs in a pipeline folder, which need not hold weights. Raises UserError."""
    index = read_json(folder / "model_index.json")
    paths = {part: folder / part / "config.json" for part in ("unet", "vae", *TEXT["sdxl"])}
    paths |= {part: folder / part / "scheduler_config.json" for part in ("scheduler", "low_res_scheduler")}
    configs = {part: read_json(path) for part, path in paths.items() if path.exists()}
    return configs | {"options": {key: index[key] for key in OPTIONS if key in index}}


def _assemble(
    found: Detected, modules: Mapping[str, Any], config: Path | None, weights: Path, path: Path
) -> Parts:
    tokenizers = {}
    for name in ("tokenizer", "tokenizer_2"):
        if name in found.configs:
            if config is not None and (config / name).is_dir():
                tokenizers[name] = load_tokenizer(config / name)
            else:
                try:
                    tokenizers[name] = make_tokenizer(found.configs[name])
                except Exception as error:  # transformers raises whatever it likes at odd values
                    reason = str(error).partition("\n")[0]
                    raise UserError(f"{path}: its {name} is damaged ({reason}); convert it again") from None
    return Parts(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoder=modules.get("text_encoder"),
        tokenizer=tokenizers.get("tokenizer"),
        text_encoder_2=modules.get("text_encoder_2"),
        tokenizer_2=tokenizers.get("tokenizer_2"),
        scheduler=found.configs["scheduler"],
        low_res_scheduler=found.configs.get("low_res_scheduler"),
        defaults=found.defaults,
        words=found.words,
        weights=weights,
        **found.options,
    )
