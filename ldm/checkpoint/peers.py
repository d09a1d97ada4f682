"""A model as a pipeline of diffusers, over the same memory."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ldm.checkpoint.parts import Parts
from ldm.checkpoint.save import pipeline_class
from ldm.models import Network


def to_diffusers(parts: Parts) -> Any:
    """diffusers' pipeline of the class that fits, whose modules share their tensors with `parts`."""
    import diffusers

    cls = getattr(diffusers, pipeline_class(parts))
    low_res = parts.low_res_scheduler
    given: dict[str, Any] = {
        "unet": _module(parts.unet, diffusers),
        "vae": _module(parts.vae, diffusers),
        "text_encoder": parts.text_encoder,
        "text_encoder_2": parts.text_encoder_2,
        "tokenizer": parts.tokenizer,
        "tokenizer_2": parts.tokenizer_2,
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
    return cls(**{name: value for name, value in given.items() if name in taken})


def _module(ours: Network, diffusers: Any) -> Any:
    """diffusers' module of the same config, given the very tensors of ours."""
    config = ours.to_config()
    with torch.device("meta"):
        theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs.eval()


def _scheduler(config: dict[str, Any], diffusers: Any) -> Any:
    return getattr(diffusers, config.get("_class_name", "DDIMScheduler")).from_config(config)
