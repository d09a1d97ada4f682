"""Networks: pure modules with diffusers' configs and parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.models.asymmetric import AsymmetricAutoencoderKL
from ldm.models.classifier import CLASS_NAME, LatentClassifier
from ldm.models.control import ControlNet, ControlNetUnion, T2IAdapter
from ldm.models.unet import UNet
from ldm.models.vae import VAE, AutoencoderKL, AutoencoderTiny, LatentDist

__all__ = [
    "MODELS",
    "VAE",
    "AsymmetricAutoencoderKL",
    "AutoencoderKL",
    "AutoencoderTiny",
    "ControlNet",
    "ControlNetUnion",
    "LatentClassifier",
    "LatentDist",
    "Network",
    "T2IAdapter",
    "UNet",
    "build",
]

Network = UNet | AutoencoderKL | AutoencoderTiny | LatentClassifier | ControlNet | T2IAdapter

# By the class that `config.json` names: diffusers', and one of ours.
MODELS: dict[str, type[Network]] = {
    "UNet2DConditionModel": UNet,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AsymmetricAutoencoderKL": AsymmetricAutoencoderKL,
    CLASS_NAME: LatentClassifier,
    "ControlNetModel": ControlNet,
    "ControlNetUnionModel": ControlNetUnion,
    "T2IAdapter": T2IAdapter,
}


def build(config: Mapping[str, Any]) -> Network:
    """The network that a `config.json` describes, with fresh weights.

    Raises:
        UserError: for a class that is not one of `MODELS`, and for keys or values that are not supported.
    """
    name = config.get("_class_name")
    if name not in MODELS:
        raise UserError(f"config: _class_name = {name!r} is not supported, only " + ", ".join(MODELS))
    return MODELS[name].from_config(config)
