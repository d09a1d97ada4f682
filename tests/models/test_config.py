"""Configs: every key of diffusers' classes is known, and what is not supported is refused by name."""

import inspect
import json
from dataclasses import fields

import diffusers
import pytest
import torch
from hub_configs import EMA, UNETS, VAES

from ldm.errors import UserError
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet, build
from ldm.models.config import KL_FIXED, TINY_FIXED, TINY_IGNORED, UNET_FIXED, KLConfig, TinyConfig, UNetConfig

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
        (UNet, "class_embed_type", "label"),
        (UNet, "class_embeddings_concat", True),
        (UNet, "addition_embed_type", "image_hint"),
        (UNet, "encoder_hid_dim", 4096),
        (UNet, "num_attention_heads", 8),
        (UNet, "dual_cross_attention", True),
        (UNet, "resnet_time_scale_shift", "scale_shift"),
        (UNet, "time_embedding_type", "fourier"),
        (UNet, "down_block_types", ["AttnDownBlock2D"] * 4),
        (UNet, "up_block_types", ["CrossAttnUpBlock2D"] * 3),
        (UNet, "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        (UNet, "only_cross_attention", [True, False]),
        (UNet, "reverse_transformer_layers_per_block", [1, 2]),
        (UNet, "reverse_transformer_layers_per_block", [[1], 1, 1, 1]),
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


@pytest.mark.parametrize(
    "config",
    [
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2816},
        {"class_embed_type": "projection"},
        {"class_embed_type": "simple_projection"},
        {"transformer_layers_per_block": [[1, 1], 1, 1, 1]},
    ],
)
def test_keys_that_need_each_other(config):
    needed = {
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "reverse_transformer_layers_per_block",
    }
    with pytest.raises(UserError, match="|".join(needed - set(config))):
        UNet.from_config(config)


@pytest.mark.parametrize("config", [*UNETS.values(), *VAES.values()], ids=[*UNETS, *VAES])
def test_every_family_is_read_and_written_with_all_its_values(config):
    with torch.device("meta"):
        model = build(config)
        written = json.loads(json.dumps(model.to_config()))
        assert build(written).config == model.config
    shared = set(config) & set(written) - {"act_fn"}
    assert {key: written[key] for key in shared} == {key: config[key] for key in shared}
    not_written = {key: value for key, value in config.items() if key not in written and key[0] != "_"}
    fixed = UNET_FIXED | KL_FIXED | TINY_FIXED
    assert all(value in fixed[key] for key, value in not_written.items() if key not in {*EMA, *TINY_IGNORED})


def test_harmless_keys_are_accepted():
    harmless = {"_diffusers_version": "0.6.0", "act_fn": "swish", "dropout": [0.0] * 4}
    ema = {"decay": 0.9999, "inv_gamma": 1.0, "power": 0.75, "optimization_step": 100, "min_decay": 0.0}
    small = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 8}
    assert UNet.from_config(small | harmless | ema).config == UNetConfig(**small)
    assert UNet.from_config(small | {"mid_block_only_cross_attention": True}).config == UNetConfig(**small)


@pytest.mark.parametrize("name", [None, "VQModel"])
def test_unknown_class_is_named(name):
    with pytest.raises(UserError, match=str(name)):
        build({"_class_name": name})
