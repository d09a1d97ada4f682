"""A model in one file, in the original layout of CompVis and Stability: read strictly, offline.

    file -> parts (`sections`) -> configs (`detect`) -> names (`keymap`) -> modules

Every tensor of a file is used, or of a kind that is known not to matter, or an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.checkpoint.io import read_json
from ldm.checkpoint.original.component import dtype_of, load_component, load_section, refuse
from ldm.checkpoint.original.detect import OPTIONS, Detected, detect, own_configs
from ldm.checkpoint.original.sections import TEXT, Single, open_single, prefixes
from ldm.checkpoint.parts import MODEL_STEM, Parts, check_fit
from ldm.checkpoint.tokenizer import load_tokenizer, make_tokenizer
from ldm.checkpoint.weights import find_weights
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.runtime import Runtime

Log = Callable[[str], object]

# Tensors that nothing is drawn with. Outside the parts: schedules, which the config has, and what training
# left.
UNUSED = re.compile(
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?(alphas_cumprod(_prev)?|betas)|posterior_\w+|lvlb_weights|"
    r"logvar|scale_factor|denoiser\.(log_)?sigmas|(low_scale_model|depth_model|model_ema|embedding_manager)\..*|"
    r"(cond_stage_model|conditioner\.embedders\.\d)\.(logit_scale|text_projection(\.weight)?)"
)
MARKS = ("v_pred", "ztsnr")


def load_single(
    path: Path,
    runtime: Runtime | None,
    *,
    prediction_type: str | None = None,
    ema: bool | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Path] | None = None,
    log: Log = print,
) -> Parts:
    """The model in a .safetensors, .ckpt or .pt file of the original layout, on the runtime's device.

    Args:
        prediction_type: "epsilon" or "v_prediction", where the file does not say it or is wrong.
        ema: take the averaged weights (True) or the plain ones (False) of a file that holds both. By default
            the plain ones, as every other program does: in merged and fine-tuned files the average is often
            still that of the model they began from.
        config: a pipeline folder whose configs and tokenizers are taken instead of the family's.
        overrides: by part ("unet", "vae", "text_encoder", "text_encoder_2"), the file or folder to take.
        log: is given a line for each thing that was guessed.

    Raises:
        UserError: naming the tensor or part that is missing or does not belong, and what to do.
    """
    parts, _ = read_single(
        path, runtime, prediction_type=prediction_type, ema=ema, config=config, overrides=overrides, log=log
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
    log: Log = print,
) -> tuple[Parts, list[str]]:
    """As `load_single`, but on the CPU, as stored without a runtime; and the names of unused tensors."""
    file, overrides = open_single(path, ema), overrides or {}
    given = own_configs(file.metadata, path) | (_read_configs(config) if config else {})
    found = detect(file, given, prediction_type)
    _check_scheduler(found.configs["scheduler"], path if config is None else config / "scheduler")
    _check_complete(file, overrides)
    unused = _unused_outside(file)
    for note in (*file.notes, *found.notes):
        log(f"{path.name} ({found.title}): {note}")
    modules: dict[str, Any] = {}
    for part, prefix in prefixes(file.family).items():
        configured = found.configs[part]
        dtype = dtype_of(part, configured, runtime)
        if part in overrides:
            modules[part] = load_component(overrides[part], part, configured, dtype)
        else:
            modules[part], left = load_section(part, configured, file.sections[part], path, prefix, dtype)
            unused += left
    weights = overrides.get("unet", path)
    weights = find_weights(weights, MODEL_STEM) if weights.is_dir() else weights
    parts = _assemble(found, modules, config, weights, path)
    check_fit(parts, {part: overrides.get(part, path) for part in modules})
    return parts, unused


def _check_scheduler(config: Mapping[str, Any], source: Path) -> None:
    """Raises UserError, as of the file or folder that it is from, for one that cannot be drawn with."""
    try:
        Schedule.from_config(dict(config))
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix('scheduler_config.json: ')}") from None


def _unused_outside(file: Single) -> list[str]:
    """Tensors of no part. Raises UserError naming one that nobody knows."""
    refuse(
        "unknown", [name for name in file.loose if not (name in MARKS or UNUSED.fullmatch(name))], file.path
    )
    return [name for name in file.loose if name not in MARKS]


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
                except Exception as error:  # tokenizers raises whatever it likes at odd values
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
