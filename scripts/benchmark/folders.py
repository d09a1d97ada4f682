"""Pipeline folders with the shapes of well-known models and random weights, made once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmark.case import MODELS


def folder_of(model: str, cache: Path) -> Path:
    """Where the folder of a model is, or is to be made: the embedded one's, in `cache`, or `model`, a path.

    Raises FileNotFoundError for a path that is no pipeline folder.
    """
    if model not in MODELS:
        if not (Path(model) / "model_index.json").exists():
            raise FileNotFoundError(f"{model}: neither one of {', '.join(MODELS)} nor a pipeline folder")
        return Path(model)
    if not MODELS[model].family:
        return Path(__file__).parents[2] / "weights" / model
    return cache / model / "folder"


def make_folder(family: str, folder: Path) -> None:
    """Write a family's published configs with random weights in fp16, as such models are distributed."""
    import torch

    from benchmark.training import filled
    from ldm.checkpoint import Parts, save_folder
    from ldm.checkpoint.original.detect import family_configs
    from ldm.checkpoint.tokenizer import make_tokenizer
    from ldm.models import build
    from ldm.models.clip import CLIPTextModel

    torch.manual_seed(0)
    configs, texts = family_configs(family), dict[str, Any]()
    for part in ("text_encoder", "text_encoder_2"):
        if part in configs:
            texts[part] = filled(partial(CLIPTextModel.from_config, configs[part]), torch.float16)
            name = part.replace("text_encoder", "tokenizer")
            texts[name] = make_tokenizer(configs.get(name) or configs["tokenizer"])
    unet, vae = (filled(partial(build, configs[part]), torch.float16) for part in ("unet", "vae"))
    zeros = bool(configs.get("force_zeros_for_empty_prompt"))
    scheduler = configs["scheduler"]
    parts = Parts(unet=unet, vae=vae, scheduler=scheduler, force_zeros_for_empty_prompt=zeros, **texts)
    save_folder(folder, parts)
