"""Configs: every key of diffusers' classes is known, and what is not supported is refused by name."""

import inspect
from dataclasses import fields

import diffusers
import pytest

from ldm.errors import UserError
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet, build
from ldm.models.config import KL_FIXED, TINY_FIXED, UNET_FIXED, KLConfig, TinyConfig, UNetConfig

FAMILIES = [
    (diffusers.UNet2DConditionModel, UNetConfig, UNET_FIXED),
    (diffusers.AutoencoderKL, KLConfig, KL_FIXED),
    (diffusers.AutoencoderTiny, TinyConfig, TINY_FIXED),
]


@pytest.mark.parametrize(("reference", "config", "fixed"), FAMILIES)
def test_keys_and_defaults_are_those_of_diffusers(reference, config, fixed):
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(reference.__init__).parameters.items()
        if name != "self"
    }
    ours = {field.name: field.default for field in fields(config)}
    assert set(ours) | set(fixed) == set(theirs)
    assert ours == {name: theirs[name] for name in ours}
    assert all(theirs[name] in allowed for name, allowed in fixed.items())


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (UNet, "class_embed_type", "projection"),
        (UNet, "addition_embed_type", "text_time"),
        (UNet, "down_block_types", ["AttnDownBlock2D"] * 4),
        (UNet, "up_block_types", ["CrossAttnUpBlock2D"] * 3),
        (UNet, "mid_block_type", "UNetMidBlock2D"),
        (UNet, "only_cross_attention", [True, True, True, False]),
        (UNet, "block_out_channels", [30, 60, 120, 120]),
        (UNet, "norm_num_groups", None),
        (UNet, "layers_per_block", "many"),
        (UNet, "transformer_layers_per_block", [[1, 2], [1, 2]]),
        (UNet, "flux_capacitor", 1.21),
        (AutoencoderKL, "latents_mean", [0.1, 0.2]),
        (AutoencoderKL, "down_block_types", ["AttnDownEncoderBlock2D"]),
        (AutoencoderKL, "scaling_factor", "big"),
        (AutoencoderTiny, "act_fn", "tanh"),
        (AutoencoderTiny, "num_encoder_blocks", [1, 3]),
        (AutoencoderTiny, "upsampling_scaling_factor", 3),
        (AutoencoderTiny, "latents_std", [1.0]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(cls, key, value):
    with pytest.raises(UserError) as refused:
        cls.from_config({key: value})
    message = str(refused.value)
    assert len(message.splitlines()) <= 2
    if key != "upsampling_scaling_factor":
        assert key in message
    if not isinstance(value, list):
        assert str(value) in message or key == "upsampling_scaling_factor"


def test_harmless_keys_are_accepted():
    harmless = {"_diffusers_version": "0.6.0", "act_fn": "swish", "only_cross_attention": [False] * 4}
    ema = {"decay": 0.9999, "inv_gamma": 1.0, "power": 0.75, "optimization_step": 100, "min_decay": 0.0}
    small = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 8}
    assert UNet.from_config(small | harmless | ema).config == UNetConfig(**small)


@pytest.mark.parametrize("name", [None, "VQModel"])
def test_unknown_class_is_named(name):
    with pytest.raises(UserError, match=str(name)):
        build({"_class_name": name})
