"""The pipeline folder of diffusers: read strictly, written so that diffusers opens it.

model_index.json            which class each part is
unet/ vae/ text_encoder/    config.json and one safetensors file each
tokenizer/                  vocab.json, merges.txt, tokenizer_config.json
scheduler/                  scheduler_config.json: the noise schedule the model was trained with
ldm.json                    ours, optional: what to draw with by default (`Defaults`)
words.txt                   ours, optional: the words the model has seen, one in a line
world.json                  ours, optional: the things it can draw, by all their names (`ldm.prompts.world`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.checkpoint.clip import empty_text_encoder, with_prefix
from ldm.checkpoint.fill import fill
from ldm.checkpoint.io import read_bytes, read_config, read_json
from ldm.checkpoint.original.component import build_stored, dtype_of, load_component, named
from ldm.checkpoint.parts import (
    EMBEDDED,
    NETWORKS,
    STEMS,
    TEXT_ENCODERS,
    TOKENIZERS,
    Defaults,
    Parts,
    check_fit,
)
from ldm.checkpoint.tokenizer import load_tokenizer
from ldm.checkpoint.weights import Stored, open_stored, warn
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.scheduler_config import noise_levels
from ldm.errors import UserError
from ldm.files import weights_folder
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet
from ldm.prompts.world import TABLE, read_world
from ldm.runtime import Runtime

# Of the classes that may be named, all that matters is in the configs.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
# None: any, as its config is read by us.
CLASSES: dict[str, tuple[str, ...] | None] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL"),
    "scheduler": None,
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),  # the slow one and the fast are one since 5.0
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "low_res_scheduler": None,
}
# Drawing does without them.
IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker", "depth_estimator")
# What training programs leave beside the parts, and how it is drawn with.
BESIDE = {
    "pytorch_lora_weights.*": "give it with --lora",
    "learned_embeds*.*": "give it with --embedding",
    "unet_ema": "give it with --unet",
}

# --- reading ---------------------------------------------------------------------------------------------


def embedded(name: str = EMBEDDED[0]) -> Path:
    """The folder of a model that comes with the package. Raises UserError where there is none."""
    path = weights_folder(name)
    if not (path / "model_index.json").exists():
        raise UserError(f"this installation has no embedded model ({path}); give the path of a model folder")
    return path


def load_folder(
    folder: Path,
    runtime: Runtime | None,
    *,
    variant: str | None = None,
    overrides: Mapping[str, Path] | None = None,
    log: Callable[[str], object] = warn,
) -> Parts:
    """All parts, each on the runtime's device in its dtype. Nothing is returned unless everything is sound.

    Args:
        runtime: None leaves all on the CPU and in the dtypes of the files.
        variant: such as "fp16": files named `model.fp16.safetensors` are read where there are any.
        overrides: by part ("unet", "vae", "text_encoder", "text_encoder_2"), a folder or file instead.
        log: is given a line for what is not read although it looks as if it were.

    Raises:
        UserError: naming the file that is missing, damaged or does not belong, and what to do.
    """
    index, overrides = _read_index(folder), overrides or {}
    networks = [part for part in NETWORKS if part in index]
    for part in overrides.keys() - networks:
        raise UserError(f"{folder}: has no {part} to replace")
    # What can be checked without reading weights comes first: most damage shows there, and at once.
    # What comes from elsewhere has no variants.
    stored = {
        part: open_stored(folder / part, STEMS[part], variant, needed=part == "unet", log=log)
        for part in networks
        if part not in overrides
    }
    stored |= {
        part: open_stored(place, STEMS[part], log=log) for part, place in overrides.items() if place.is_dir()
    }
    for line in _beside(folder):
        log(line)
    weights = stored["unet"].path if "unet" in stored else overrides["unet"]
    small = _load_small_parts(folder, index)
    sources = {part: overrides.get(part, folder / part) for part in networks}
    tokenizers = {part: load_tokenizer(folder / part) for part in TOKENIZERS if part in index}
    empty = {part: _make_empty(part, each) for part, each in stored.items()}
    modules = {
        part: _load_network(
            part, stored.pop(part, None), empty.get(part), sources[part], folder / part, runtime
        )
        for part in networks
    }
    nothing = {"text_encoder": None, "tokenizer": None}
    parts = Parts(**{**nothing, **modules, **tokenizers, **small}, weights=weights)
    check_fit(parts, sources)
    return parts


def _beside(folder: Path) -> Iterator[str]:
    for pattern, advice in BESIDE.items():
        for path in sorted(folder.glob(pattern)):
            yield f"{folder}: {path.name} is not read by itself: {advice}"


def _load_small_parts(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """What is in JSON: the fields of `Parts` that are neither networks nor tokenizers."""
    parts: dict[str, Any] = {
        "defaults": read_defaults(folder / "ldm.json"),
        "words": read_words(folder / "words.txt"),
        "world": read_world(folder / TABLE),
        "scheduler": _load_scheduler(folder / "scheduler", Schedule.from_config),
        "force_zeros_for_empty_prompt": index.get(
            "force_zeros_for_empty_prompt", "XL" in index["_class_name"]
        ),
        "requires_aesthetics_score": index.get("requires_aesthetics_score", False),
        "max_noise_level": index.get("max_noise_level", 350),
    }
    if "low_res_scheduler" in index:
        parts["low_res_scheduler"] = _load_scheduler(folder / "low_res_scheduler", noise_levels)
    return parts


def _make_empty(part: str, stored: Stored) -> Any:
    """The module that a network's tensors go to, which they fit."""
    if part in TEXT_ENCODERS:
        return empty_text_encoder(stored.config, stored.tensors, stored.path)
    return build_stored(stored)


def _load_network(
    part: str,
    stored: Stored | None,
    empty: Any,
    source: Path,
    original: Path,
    runtime: Runtime | None,
) -> Any:
    """A network, ready to draw: as it was opened, or from the file `source` with the config in `original`."""
    config = read_config(original / "config.json") if stored is None else stored.config
    dtype = dtype_of(part, config, runtime)
    if stored is None:
        module = load_component(source, part, config, dtype)
    else:
        tensors = with_prefix(stored.tensors) if part in TEXT_ENCODERS else named(stored)
        module = fill(empty, tensors, stored.path, dtype)
    classes = {"unet": UNet, "vae": AutoencoderKL | AutoencoderTiny}
    if part in classes and not isinstance(module, classes[part]):
        raise UserError(f"{source}: a {config.get('_class_name')}, which cannot be the {part}")
    return module if runtime is None else runtime.place(module, dtype)


def load_vae(place: Path, config: Mapping[str, Any], runtime: Runtime) -> AutoencoderKL | AutoencoderTiny:
    """A VAE from a folder or file of its own, in place of one of that config. Raises UserError."""
    config = read_config(place / "config.json") if place.is_dir() else config
    dtype = dtype_of("vae", config, runtime)
    module = load_component(place, "vae", config, dtype)
    if not isinstance(module, AutoencoderKL | AutoencoderTiny):
        raise UserError(f"{place}: a {config.get('_class_name')}, which cannot be the vae")
    return runtime.place(module, dtype)


def _load_scheduler(folder: Path, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    config = read_config(path := folder / "scheduler_config.json")
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('scheduler_config.json: ')}") from None
    return config


def read_defaults(path: Path) -> Defaults:
    """`Defaults` from a JSON file, or as they are without it. Raises UserError naming an unknown key."""
    if not path.exists():
        return Defaults()
    values = read_json(path)
    known = [each.name for each in fields(Defaults)]
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; it may hold {', '.join(known)}")
    return Defaults(**values)


def read_words(path: Path) -> frozenset[str]:
    """The words in a file, one in a line; none without the file."""
    return frozenset(read_bytes(path).decode("utf-8", "replace").split()) if path.exists() else frozenset()


def _read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, without the parts that are null or not needed. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the path of a diffusers pipeline folder")
    path = folder / "model_index.json"
    index = {
        part: value
        for part, value in read_json(path).items()
        if part not in IGNORED and value not in (None, [None, None])
    }
    if (name := index.get("_class_name")) not in PIPELINES:
        raise UserError(f"{path}: _class_name {name!r} cannot be read; only Stable Diffusion pipelines can")
    for part, value in index.items():
        if isinstance(value, list):
            _check_class(path, part, value)
    wanted = ["unet", "vae", "scheduler"]
    pairs = zip(TEXT_ENCODERS, TOKENIZERS, strict=True)
    wanted += [
        tokenizer for encoder, tokenizer in pairs if encoder in index
    ]  # without any: drawn from embeddings
    wanted += ["low_res_scheduler"] if name == "StableDiffusionUpscalePipeline" else []
    for part in wanted:
        if not isinstance(index.get(part), list):
            raise UserError(f"{path}: has no {part}; a pipeline needs one")
    return index


def _check_class(path: Path, part: str, value: list[Any]) -> None:
    """An entry of model_index.json: [library, class]."""
    library, name = value if len(value) == 2 else (None, value)
    if part not in CLASSES:
        raise UserError(f"{path}: unknown part {part}; only Stable Diffusion pipelines can be read")
    if library not in ("diffusers", "transformers"):
        raise UserError(f"{path}: {part} is {library}.{name}, code of the model's own, which is never run")
    classes = CLASSES[part]
    if classes is not None and name not in classes:
        raise UserError(f"{path}: {part} is a {name}, which cannot be read; only {' or '.join(classes)} can")
