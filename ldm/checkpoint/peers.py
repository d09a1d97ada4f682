"""Our modules as those of diffusers and transformers, over the same memory, and theirs as ours."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.clip import PREFIX, make_text_encoder
from ldm.checkpoint.parts import TEXT_ENCODERS, TOKENIZERS, Parts
from ldm.checkpoint.save import pipeline_class
from ldm.models import Network
from ldm.models.clip import CLIPTextModel
from ldm.prompts.tokenizer import CLIPTokenizer


def to_diffusers(parts: Parts) -> Any:
    """diffusers' pipeline of the class that fits, whose modules share their tensors with `parts`."""
    import diffusers

    cls = getattr(diffusers, pipeline_class(parts))
    low_res = parts.low_res_scheduler
    given: dict[str, Any] = {
        "unet": _module(parts.unet, diffusers),
        "vae": _module(parts.vae, diffusers),
        **{part: _text_encoder(own) for part in TEXT_ENCODERS if (own := getattr(parts, part)) is not None},
        **{part: _tokenizer(own) for part in TOKENIZERS if (own := getattr(parts, part)) is not None},
        "scheduler": _scheduler(dict(parts.scheduler), diffusers),
        "low_res_scheduler": None if low_res is None else _scheduler(dict(low_res), diffusers),
        "force_zeros_for_empty_prompt": parts.force_zeros_for_empty_prompt,
        "requires_aesthetics_score": parts.requires_aesthetics_score,
        "max_noise_level": parts.max_noise_level,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        "add_watermarker": False,
    }
    taken = inspect.signature(cls.__init__).parameters
    return cls(**{name: given.get(name) for name in taken if name in {*given, *TEXT_ENCODERS, *TOKENIZERS}})


def _module(ours: Network, diffusers: Any) -> Any:
    """diffusers' module of the same config, given the very tensors of ours."""
    config = ours.to_config()
    with torch.device("meta"):
        theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs.eval()


def _text_encoder(ours: CLIPTextModel) -> Any:
    import transformers

    with torch.device("meta"):
        config = transformers.CLIPTextConfig.from_dict(ours.to_config())
        theirs = getattr(transformers, ours.class_name)(config)
    names = theirs.state_dict().keys()  # with the prefix or without
    tensors = {
        name if name in names else name.removeprefix(PREFIX): t for name, t in ours.state_dict().items()
    }
    theirs.load_state_dict(tensors, assign=True)
    for module in theirs.modules():
        if hasattr(module, "position_ids"):  # not stored, so it is still on the meta device
            places = torch.arange(config.max_position_embeddings, device=theirs.device)[None]
            module.register_buffer("position_ids", places, persistent=False)
    return theirs.eval()


def _tokenizer(ours: CLIPTokenizer) -> Any:
    import transformers

    described = ours.describe()
    merges = [tuple(pair) for pair in described.pop("merges")]
    added = ours.added_tokens_decoder
    return transformers.CLIPTokenizer(merges=merges, added_tokens_decoder=added, **described)


def text_encoder_of(theirs: Any) -> CLIPTextModel:
    """transformers' CLIPTextModel or CLIPTextModelWithProjection as ours, of the very tensors."""
    name = type(theirs).__name__
    config = theirs.config.to_dict() | {"architectures": [name]}
    return make_text_encoder(config, theirs.state_dict(), Path(name))


def fresh_text_encoder(config: Mapping[str, Any], tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder for a tokenizer, with the random weights that transformers begins with."""
    import transformers

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    return text_encoder_of(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, **ids, **sizes)))


def _scheduler(config: dict[str, Any], diffusers: Any) -> Any:
    return getattr(diffusers, config.get("_class_name", "DDIMScheduler")).from_config(config)
