"""A model written to disk: as a pipeline folder that diffusers opens, or in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.io import Later, suffix_of, write_json, write_tensors
from ldm.checkpoint.keymap import Key, module_keys, text_keys, to_original
from ldm.checkpoint.original.detect import ARCHITECTURES, OPTIONS, OWN, PREDICTIONS
from ldm.checkpoint.original.sections import TEXT, prefixes
from ldm.checkpoint.parts import (
    MODEL_STEM,
    NETWORKS,
    STEMS,
    TEXT_ENCODERS,
    TEXT_STEM,
    TOKENIZERS,
    Parts,
)
from ldm.checkpoint.tokenizer import bpe
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.files import whole_file, whole_folder
from ldm.models import Network
from ldm.models.clip import CLIPTextModel
from ldm.models.kind import Kind
from ldm.prompts.tokenizer import CLIPTokenizer
from ldm.prompts.world import TABLE

State = Mapping[str, Tensor | Later]  # by the names in a module
SCHEDULERS = ("scheduler", "low_res_scheduler")
# In the names of diffusers' pipelines.
PIPELINE_KINDS = {
    Kind.TEXT: "",
    Kind.DEPTH: "Depth2Img",
    Kind.UPSCALE: "Upscale",
    Kind.PIX2PIX: "InstructPix2Pix",
    Kind.INPAINT: "Inpaint",
}


def save_model(
    path: Path,
    parts: Parts,
    dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
    *,
    states: Mapping[str, State] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a single file if `path` ends in .safetensors, and a pipeline folder otherwise; all or nothing.

    Args:
        dtype: of floating-point tensors; None keeps the modules'.
        max_shard_size: "5GB", "500MB": larger files of a folder are cut.
        states: by part, the tensors that are written in place of its own: of the same names and shapes.
        header: what else the metadata of every file of weights says.

    Raises:
        UserError: if `path` cannot be written to, or a single file cannot hold this model.
    """
    if suffix_of(path) == ".safetensors" and max_shard_size is not None:
        raise UserError(f"{path}: a single file has no shards: leave max_shard_size out or save a folder")
    if suffix_of(path) in (".ckpt", ".pt", ".bin"):
        raise UserError(f"{path}: pickles are not written, as they can carry code: use .safetensors")
    if suffix_of(path) == ".safetensors":
        save_single(path, parts, dtype, states=states, header=header)
    else:
        save_folder(path, parts, dtype, max_shard_size, states=states, header=header)


# --- a folder --------------------------------------------------------------------------------------------


def save_folder(
    folder: Path,
    parts: Parts,
    dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
    *,
    states: Mapping[str, State] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a pipeline folder, all of it or nothing, in `dtype` or in that of the modules.

    The other arguments are those of `save_model`.
    """
    with whole_folder(Path(folder)) as aside:
        write_json(aside / "model_index.json", _index(parts))
        for name in NETWORKS:
            if (module := getattr(parts, name)) is not None:
                state = (states or {}).get(name) or module.state_dict()
                _write_network(
                    aside / name, STEMS[name], module.to_config(), state, dtype, max_shard_size, header
                )
        for name in TOKENIZERS:
            if (tokenizer := getattr(parts, name)) is not None:
                save_tokenizer(tokenizer, aside / name)
        for name in SCHEDULERS:
            if (config := getattr(parts, name)) is not None:
                (aside / name).mkdir()
                write_json(aside / name / "scheduler_config.json", config)
        write_json(aside / "ldm.json", _defaults(parts))
        if parts.words:
            _write_lines(aside / "words.txt", sorted(parts.words))
        if parts.world is not None:
            parts.world.write(aside / TABLE)


def save_module(
    module: Network, folder: Path, dtype: torch.dtype | None = None, max_shard_size: str | None = None
) -> None:
    """Write the config.json and weights of a U-Net or VAE."""
    _write_network(folder, MODEL_STEM, module.to_config(), module.state_dict(), dtype, max_shard_size)


def save_text_encoder(
    model: CLIPTextModel, folder: Path, dtype: torch.dtype | None = None, max_shard_size: str | None = None
) -> None:
    """Write the config.json and weights of a text encoder, which every version of transformers reads."""
    _write_network(folder, TEXT_STEM, model.to_config(), model.state_dict(), dtype, max_shard_size)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, which every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    described = tokenizer.describe()
    write_json(folder / "vocab.json", described.pop("vocab"))
    merges = map(" ".join, described.pop("merges"))
    _write_lines(folder / "merges.txt", ["#version: 0.2", *merges])
    config = {"tokenizer_class": "CLIPTokenizer", **described}
    if _learnt_words(tokenizer):
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        config["added_tokens_decoder"] = {
            str(i): {flag: getattr(token, flag) for flag in flags}
            for i, token in tokenizer.added_tokens_decoder.items()
        }
    write_json(folder / "tokenizer_config.json", config)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """The same bytes on every system."""
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _learnt_words(tokenizer: CLIPTokenizer) -> list[str]:
    """Those of textual inversions, which are no part of CLIP's vocabulary."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]


def pipeline_class(parts: Parts) -> str:
    """The name of diffusers' pipeline for a model, which its configs tell."""
    kind = PIPELINE_KINDS[parts.kind]
    if "time_ids" in parts.unet.config.conditioning:
        is_refiner = parts.text_encoder is None and parts.text_encoder_2 is not None and not kind
        return f"StableDiffusionXL{'Img2Img' if is_refiner else kind}Pipeline"
    if parts.unet.config.time_cond_proj_dim is not None and not kind:
        return "LatentConsistencyModelPipeline"
    return f"StableDiffusion{kind}Pipeline"


def _index(parts: Parts) -> dict[str, Any]:
    """model_index.json: the class of each part, and what the pipeline is made with."""
    name, absent = pipeline_class(parts), [None, None]
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": "0.36.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(parts.vae).__name__],
    }
    for encoder, tokenizer in zip(TEXT["sdxl"], TOKENIZERS, strict=True):
        model = getattr(parts, encoder)
        if model is not None:
            index |= {encoder: ["transformers", model.class_name]}
            index |= {tokenizer: ["transformers", "CLIPTokenizer"]}
        elif "XL" in name:
            index |= {encoder: absent, tokenizer: absent}
    for scheduler in SCHEDULERS:
        if (config := getattr(parts, scheduler)) is not None:
            index[scheduler] = ["diffusers", config.get("_class_name", "DDIMScheduler")]
    if "XL" in name:
        index["force_zeros_for_empty_prompt"] = parts.force_zeros_for_empty_prompt
        if "Img2Img" in name or "Inpaint" in name:
            index["requires_aesthetics_score"] = parts.requires_aesthetics_score
        if "InstructPix2Pix" in name:
            return index | {"is_cosxl_edit": False}
        return index | {"feature_extractor": absent, "image_encoder": absent}
    if "Depth2Img" in name:
        return index | {"depth_estimator": absent, "feature_extractor": absent}
    index |= {"safety_checker": absent, "feature_extractor": absent}
    if "Upscale" in name:
        return index | {"watermarker": absent, "max_noise_level": parts.max_noise_level}
    return index | {"image_encoder": absent, "requires_safety_checker": False}


def _write_network(
    folder: Path,
    stem: str,
    config: Mapping[str, Any],
    tensors: State,
    dtype: torch.dtype | None,
    max_shard_size: str | None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Its config.json, and one safetensors file, or several with the index that other libraries read too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    if max_shard_size is None:
        write_tensors(folder / f"{stem}.safetensors", tensors, dtype, header)
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = {
        name: torch.empty_like(t, device="meta", dtype=dtype if t.is_floating_point() else None)
        for name, t in _likes(tensors).items()
    }
    pattern = f"{stem}{{suffix}}.safetensors"
    try:
        split = split_torch_state_dict_into_shards(
            sizes, filename_pattern=pattern, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise UserError(f"max_shard_size {max_shard_size!r} is not a size: {error}") from None
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, dtype, header)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def _likes(state: State) -> dict[str, Tensor]:
    """Tensors of the same shapes and dtypes, without numbers."""
    return {
        name: torch.empty_like(each.like if isinstance(each, Later) else each, device="meta")
        for name, each in state.items()
    }


def _defaults(parts: Parts) -> dict[str, Any]:
    return {key: value for key, value in asdict(parts.defaults).items() if value is not None}


# --- one file --------------------------------------------------------------------------------------------


def save_single(
    path: Path,
    parts: Parts,
    dtype: torch.dtype | None = None,
    *,
    states: Mapping[str, State] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file in the original layout, which other programs read too; all or nothing.

    What a folder has beside tensors goes into the header, so that `ldm` reads the file without a guess.
    The arguments are those of `save_model`.

    Raises:
        UserError: for a part that the layout has no names for, and if `path` cannot be written to.
    """
    words = [word for name in TOKENIZERS if (own := getattr(parts, name)) for word in _learnt_words(own)]
    if words:
        raise UserError(f"{path}: a single file cannot hold {words[0]}, a textual inversion: save a folder")
    family = family_of_parts(parts)
    tensors: dict[str, Tensor | Later] = {}
    for part, prefix in prefixes(family).items():
        module = getattr(parts, part)
        if part in TEXT_ENCODERS:
            open_clip = not TEXT[family][part].endswith("transformer.")
            keys = text_keys(module.to_config(), open_clip)
        else:
            keys = module_keys(module)
        renamed = _to_original(keys, (states or {}).get(part) or module.state_dict())
        tensors |= {prefix + name: tensor for name, tensor in renamed.items()}
    schedule = Schedule.from_config(dict(parts.scheduler))
    if family == "sdxl" and schedule.prediction.value == "v_prediction":
        # Marks that other programs look for.
        tensors["v_pred"] = torch.tensor([])
        if schedule.zero_terminal_snr:
            tensors["ztsnr"] = torch.tensor([])
    with whole_file(path) as aside:
        metadata = _metadata(path, family, parts, schedule.prediction.value)
        write_tensors(aside, tensors, dtype, {**metadata, **(header or {})})


def _to_original(keys: Iterable[Key], state: State) -> dict[str, Later]:
    """As `to_original`, each tensor when it is written."""
    likes = to_original(keys, _likes(state))

    def make(key: Key) -> Tensor:
        found = {name: state[name] for name in key.names}
        made = {name: each.make() if isinstance(each, Later) else each for name, each in found.items()}
        return to_original([key], made)[key.original]

    return {key.original: Later(likes[key.original], partial(make, key)) for key in keys}


def family_of_parts(parts: Parts) -> str:
    """The family by which a model's tensors are named in a single file: as `sections.family_of` finds it."""
    if parts.text_encoder_2 is not None:
        return "sdxl_refiner" if parts.text_encoder is None else "sdxl"
    if parts.unet.config.num_class_embeds is not None:
        return "x4_upscaler"
    return "sd2" if parts.unet.config.use_linear_projection else "sd1"


def _metadata(path: Path, family: str, parts: Parts, prediction: str) -> dict[str, str]:
    """ModelSpec (https://github.com/Stability-AI/ModelSpec), and what of the model is not tensors."""
    own: dict[str, Any] = {"unet": parts.unet.to_config(), "vae": parts.vae.to_config()}
    own |= {part: getattr(parts, part).to_config() for part in TEXT[family]}
    own |= {name: getattr(parts, name) for name in SCHEDULERS if getattr(parts, name) is not None}
    for name in TOKENIZERS:
        if getattr(parts, name) is not None:
            own[name] = described = getattr(parts, name).describe()
            if (described["vocab"], list(map(tuple, described["merges"]))) == bpe():
                del described["vocab"], described["merges"]  # CLIP's, which comes with the package
    own |= {"options": {key: getattr(parts, key) for key in OPTIONS}, "defaults": _defaults(parts)}
    own["words"] = sorted(parts.words)
    size = parts.unet.config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(family, prediction),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{width * parts.vae.downscale}x{height * parts.vae.downscale}",
        "modelspec.prediction_type": next(k for k, v in PREDICTIONS.items() if v == prediction),
        OWN: json.dumps(own),
    }


def _architecture(family: str, prediction: str) -> str:
    if family in ("sd2", "x4_upscaler"):
        return next(name for name, value in ARCHITECTURES.items() if value == prediction)
    names = {"sd1": "v1", "sdxl": "xl-v1-base", "sdxl_refiner": "xl-v1-refiner"}
    return f"stable-diffusion-{names[family]}"
