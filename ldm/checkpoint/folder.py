"""The pipeline folder of diffusers: read strictly, written so that diffusers opens it.

model_index.json            which class each part is
unet/ vae/ text_encoder/    config.json and one safetensors file each
tokenizer/                  vocab.json, merges.txt, tokenizer_config.json
scheduler/                  scheduler_config.json: the noise schedule the model was trained with
ldm.json                    ours, optional: what to draw with by default (`Defaults`)
words.txt                   ours, optional: the words the model has seen, one in a line
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.clip import load_text_encoder, load_tokenizer, save_text_encoder, save_tokenizer
from ldm.checkpoint.io import (
    fill,
    find_weights,
    read_bytes,
    read_json,
    read_tensors,
    whole_folder,
    write_json,
    write_tensors,
)
from ldm.errors import UserError
from ldm.models import AutoencoderKL, AutoencoderTiny, Model, UNet, build
from ldm.runtime import Runtime
from ldm.schedule import Schedule

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),  # the slow one and the fast are one since 5.0
}
# Drawing does without them.
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
MODEL_STEM = "diffusion_pytorch_model"
# Names that diffusers gave the VAE's attention before 0.15; Stable Diffusion 1.5 is stored with them.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Defaults:
    """What `ldm.json` may say: how to draw with this model when the caller does not."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sampler: str | None = None  # None: that of scheduler_config.json
    spacing: str | None = None
    height: int | None = None  # None: the U-Net's sample_size
    width: int | None = None


@dataclass(frozen=True)
class Parts:
    """All that a pipeline folder holds."""

    unet: UNet
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: Any  # transformers' CLIPTextModel
    tokenizer: Any  # transformers' CLIPTokenizer
    scheduler: Mapping[str, Any]  # scheduler_config.json
    defaults: Defaults = field(default_factory=Defaults)
    words: frozenset[str] = frozenset()  # that the model has seen; empty if not known
    weights: Path | None = None  # the U-Net's file, if the parts were read from a folder

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that are not in `words`; none where the model does not tell its words."""
        seen = dict.fromkeys(re.findall(r"[a-z']+", prompt.lower()))
        return [word for word in seen if self.words and word not in self.words]


# --- reading ---------------------------------------------------------------------------------------------


def embedded() -> Path:
    """The folder of the model that comes with the package. Raises UserError where there is none."""
    try:
        path = Path(str(importlib.resources.files("ldm.weights") / "postcard"))
    except ModuleNotFoundError:  # a checkout that is not installed
        path = Path(__file__).parents[2] / "weights" / "postcard"
    if not (path / "model_index.json").exists():
        raise UserError(f"this installation has no embedded model ({path}); give the path of a model folder")
    return path


def load_folder(folder: Path, runtime: Runtime) -> Parts:
    """All parts, each on the runtime's device in its dtype. Nothing is returned unless everything is sound.

    Raises:
        UserError: naming the file that is missing, damaged or does not belong, and what to do.
    """
    _check_index(folder)
    scheduler = _load_scheduler(folder / "scheduler" / "scheduler_config.json")
    defaults, words = read_defaults(folder / "ldm.json"), read_words(folder / "words.txt")
    tokenizer = load_tokenizer(folder / "tokenizer")
    text_encoder = load_text_encoder(folder / "text_encoder")
    unet, vae = load_module(folder / "unet"), load_module(folder / "vae")
    if not isinstance(unet, UNet) or isinstance(vae, UNet):
        raise UserError(f"{folder}: unet/config.json and vae/config.json are of the wrong class")
    _check_fit(folder, unet, vae, text_encoder, tokenizer)
    return Parts(
        unet=runtime.place(unet),
        vae=runtime.place(vae, runtime.vae_dtype(vae.config.force_upcast)),
        text_encoder=runtime.place(text_encoder),
        tokenizer=tokenizer,
        scheduler=scheduler,
        defaults=defaults,
        words=words,
        weights=find_weights(folder / "unet", MODEL_STEM),
    )


def load_module(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """The U-Net or VAE in `folder`, in `dtype` or as stored, mapped from the file. Raises UserError."""
    config = read_json(folder / "config.json")
    path = find_weights(folder, MODEL_STEM)
    try:
        with torch.device("meta"):
            module = build(config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return fill(module, {_new_name(name): t for name, t in read_tensors(path).items()}, path).to(dtype)


def _load_scheduler(path: Path) -> dict[str, Any]:
    config = read_json(path)
    try:
        Schedule.from_config(config)
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


def _check_index(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the path of a diffusers pipeline folder")
    path = folder / "model_index.json"
    index = read_json(path)
    for part in PARTS:
        if part not in index:
            raise UserError(f"{path}: has no {part}; only Stable Diffusion pipelines can be read")
    for part, value in index.items():
        if part.startswith("_") or part in IGNORED or not isinstance(value, list) or value == [None, None]:
            continue
        if part not in PARTS:
            raise UserError(f"{path}: unknown part {part}; only Stable Diffusion pipelines can be read")
        if part in CLASSES and value[-1] not in CLASSES[part]:
            wanted = " or ".join(CLASSES[part])
            raise UserError(f"{path}: {part} is a {value[-1]}, which cannot be read; only {wanted} can")


def _check_fit(folder: Path, unet: UNet, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Parts that are each sound may still come from different models."""
    tokens, rows = len(tokenizer), text_encoder.config.vocab_size
    width, taken = text_encoder.config.hidden_size, unet.config.in_channels
    if taken != vae.latent_channels:
        raise UserError(f"{folder}: the U-Net takes {taken} channels and the VAE gives {vae.latent_channels}")
    if set(unet.config.per_level("cross_attention_dim")) != {width}:
        raise UserError(f"{folder}: the U-Net does not take the text encoder's {width} channels")
    if tokens > rows:
        raise UserError(f"{folder}: the tokenizer has {tokens} tokens, the text encoder only {rows}")


def _new_name(name: str) -> str:
    """mid_block.attentions.0.query.weight -> mid_block.attentions.0.to_q.weight."""
    head, _, kind = name.rpartition(".")
    before, _, layer = head.rpartition(".")
    return f"{before}.{OLD_ATTENTION[layer]}.{kind}" if layer in OLD_ATTENTION else name


# --- writing ---------------------------------------------------------------------------------------------


def save_folder(folder: Path, parts: Parts, dtype: torch.dtype | None = None) -> None:
    """Write a pipeline folder, all of it or nothing, in `dtype` or in that of the modules."""
    with whole_folder(Path(folder)) as aside:
        write_json(aside / "model_index.json", _index(parts))
        save_module(parts.unet, aside / "unet", dtype)
        save_module(parts.vae, aside / "vae", dtype)
        save_text_encoder(parts.text_encoder, aside / "text_encoder", dtype)
        save_tokenizer(parts.tokenizer, aside / "tokenizer")
        (aside / "scheduler").mkdir()
        write_json(aside / "scheduler" / "scheduler_config.json", parts.scheduler)
        write_json(aside / "ldm.json", {k: v for k, v in asdict(parts.defaults).items() if v is not None})
        if parts.words:
            (aside / "words.txt").write_text("\n".join(sorted(parts.words)) + "\n")


def save_module(module: Model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the config.json and weights of a U-Net or VAE."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", module.to_config())
    write_tensors(folder / f"{MODEL_STEM}.safetensors", module.state_dict(), dtype)


def _index(parts: Parts) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(parts.vae).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", parts.scheduler.get("_class_name", "DDIMScheduler")],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
