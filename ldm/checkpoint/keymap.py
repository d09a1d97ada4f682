"""Names of tensors in the original single-file layout, and in diffusers' and transformers' modules.

One table for both directions, made from a config by rules: `unet_keys`, `vae_keys` and `text_keys` list every
tensor of a part as a `Key`, and `from_original` and `to_original` rename by that list. The original layout is
that of CompVis/stable-diffusion, Stability-AI/stablediffusion and Stability-AI/generative-models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models import AsymmetricAutoencoderKL, AutoencoderKL, ControlNet, Network, UNet
from ldm.models.config import KLConfig, UNetConfig
from ldm.models.control import ControlNetConfig, ControlNetUnion

Form = Literal["same", "conv", "transposed", "stacked"]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # LCM's, which has no original: our name for it
    "class_embedding": "label_emb",  # a table of rows; or two layers:
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
CLIP_LAYER = (*OPEN_CLIP_LAYER, *(f"self_attn.{each}_proj" for each in "qkv"))


@dataclass(frozen=True)
class Key:
    """One tensor of a single file, and the one or three that diffusers makes of it.

    `form` is how they differ: "conv" is a 1 x 1 convolution there and a linear layer here, "transposed" a
    matrix that is multiplied from the other side, "stacked" three tensors one above the other.
    """

    original: str
    names: tuple[str, ...]
    form: Form = "same"


def module_keys(module: Network) -> list[Key]:
    """The tensors of a U-Net, VAE or ControlNet. Raises UserError for one without names in that layout."""
    if isinstance(module, ControlNet) and not isinstance(module, ControlNetUnion):
        modules = control_modules(module.config)
        return [Key(_rename(name, modules, "ControlNet"), (name,)) for name in module.state_dict()]
    if isinstance(module, UNet):
        return unet_keys(module.config, module.state_dict())
    if isinstance(module, AutoencoderKL) and not isinstance(module, AsymmetricAutoencoderKL):
        return vae_keys(module.config, module.state_dict())
    raise UserError(f"the single-file layout has no {type(module).__name__}: save a folder instead")


# --- the U-Net -------------------------------------------------------------------------------------------


def unet_keys(config: UNetConfig, names: Iterable[str]) -> list[Key]:
    """The U-Net's tensors; `names` are those of its state dict. Raises UserError for one without a rule."""
    modules = unet_modules(config)
    return [Key(_rename(name, modules, "U-Net"), (name,)) for name in names]


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """The U-Net's modules by diffusers' names: down_blocks.1.attentions.0 is input_blocks.4.1 in files."""
    layers, last = config.per_level("layers_per_block"), len(config.block_out_channels) - 1
    modules, i = dict(UNET_ENDS), 1
    for level, count in enumerate(layers):
        block = f"down_blocks.{level}"
        for layer in range(count):
            modules |= _under(f"{block}.resnets.{layer}", f"input_blocks.{i}.0", RESNET)
            modules[f"{block}.attentions.{layer}"] = f"input_blocks.{i}.1"
            i += 1
        if level < last:
            modules[f"{block}.downsamplers.0.conv"] = f"input_blocks.{i}.0.op"
            i += 1
    modules |= _under("mid_block.resnets.0", "middle_block.0", RESNET)
    modules["mid_block.attentions.0"] = "middle_block.1"
    modules |= _under("mid_block.resnets.1", "middle_block.2", RESNET)
    i = 0
    for level, (kind, count) in enumerate(zip(config.up_block_types, reversed(layers), strict=True)):
        block = f"up_blocks.{level}"
        for layer in range(count + 1):
            modules |= _under(f"{block}.resnets.{layer}", f"output_blocks.{i}.0", RESNET)
            modules[f"{block}.attentions.{layer}"] = f"output_blocks.{i}.1"
            i += 1
        # The upsampler follows what the level's last block holds: a resnet, and a transformer or not.
        place = 2 if kind.startswith("CrossAttn") else 1
        modules[f"{block}.upsamplers.0.conv"] = f"output_blocks.{i - 1}.{place}.conv"
    return modules


def control_modules(config: ControlNetConfig) -> dict[str, str]:
    """A ControlNet's modules by diffusers' names: those of a U-Net, the picture's and the outputs'."""
    modules, ours = unet_modules(config), "controlnet_cond_embedding"
    inner = [f"blocks.{k}" for k in range(2 * len(config.conditioning_embedding_out_channels) - 2)]
    for k, name in enumerate(("conv_in", *inner, "conv_out")):
        modules[f"{ours}.{name}"] = f"input_hint_block.{2 * k}"
    for k in range(len(config.skip_channels)):
        modules[f"controlnet_down_blocks.{k}"] = f"zero_convs.{k}.0"
    return modules | {"controlnet_mid_block": "middle_block_out.0"}


# --- the VAE ---------------------------------------------------------------------------------------------


def vae_keys(config: KLConfig, names: Iterable[str]) -> list[Key]:
    """The VAE's tensors; `names` are those of its state dict. Raises UserError for one without a rule."""
    modules = _vae_modules(config)
    linear = tuple(f"mid_block.attentions.0.{to}.weight" for to in VAE_ATTENTION if to.startswith("to_"))
    return [
        Key(_rename(name, modules, "VAE"), (name,), "conv" if name.endswith(linear) else "same")
        for name in names
    ]


def _vae_modules(config: KLConfig) -> dict[str, str]:
    levels, layers = len(config.block_out_channels), config.layers_per_block
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        modules |= _under(side, side, VAE_ENDS)
        for k in range(2):
            modules |= _under(f"{side}.mid_block.resnets.{k}", f"{side}.mid.block_{k + 1}", VAE_RESNET)
        modules |= _under(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"  # the finest is 0 in both
        ours_down, ours_up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        for layer in range(layers):
            modules |= _under(f"{ours_down}.resnets.{layer}", f"{down}.block.{layer}", VAE_RESNET)
        for layer in range(layers + 1):
            modules |= _under(f"{ours_up}.resnets.{layer}", f"{up}.block.{layer}", VAE_RESNET)
        modules[f"{ours_down}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        modules[f"{ours_up}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    return modules


# --- text encoders ---------------------------------------------------------------------------------------


def text_keys(config: Mapping[str, Any], open_clip: bool) -> list[Key]:
    """The tensors of CLIP's text encoder as OpenCLIP stores them, or as transformers does.

    Names in modules have the prefix `text_model.`; `config` is transformers' config.json.
    """
    layers = range(config.get("num_hidden_layers", 12))  # as in transformers
    projects = config.get("architectures") == ["CLIPTextModelWithProjection"]
    if open_clip:
        return [
            *_open_clip_keys(layers),
            *[Key("text_projection", ("text_projection.weight",), "transposed")] * projects,
        ]
    names = [
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        *_parameters("text_model.final_layer_norm"),
        *(
            name
            for n in layers
            for part in CLIP_LAYER
            for name in _parameters(f"text_model.encoder.layers.{n}.{part}")
        ),
        *["text_projection.weight"] * projects,
    ]
    return [Key(name, (name,)) for name in names]


def _open_clip_keys(layers: Iterable[int]) -> Iterator[Key]:
    yield Key("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",))
    yield Key("positional_embedding", ("text_model.embeddings.position_embedding.weight",))
    for kind in ("weight", "bias"):
        yield Key(f"ln_final.{kind}", (f"text_model.final_layer_norm.{kind}",))
        for n in layers:
            ours, theirs = f"text_model.encoder.layers.{n}", f"transformer.resblocks.{n}"
            for part, original in OPEN_CLIP_LAYER.items():
                yield Key(f"{theirs}.{original}.{kind}", (f"{ours}.{part}.{kind}",))
            three = tuple(f"{ours}.self_attn.{each}_proj.{kind}" for each in "qkv")
            yield Key(f"{theirs}.attn.in_proj_{kind}", three, "stacked")


# --- renaming --------------------------------------------------------------------------------------------


def from_original(keys: Iterable[Key], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's tensors as its module names them; views of what the file holds. All keys must be there."""
    renamed: dict[str, Tensor] = {}
    for key in keys:
        tensor = tensors[key.original]
        if key.form in ("conv", "transposed") and tensor.ndim > 2:  # some tools write the first as a matrix
            tensor = tensor.flatten(1)
        if key.form == "transposed":
            tensor = tensor.T
        parts = tensor.chunk(3) if key.form == "stacked" else (tensor,)
        renamed |= zip(key.names, parts, strict=True)
    return renamed


def to_original(keys: Iterable[Key], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    return {key.original: _stored(key.form, [tensors[name] for name in key.names]) for key in keys}


def _stored(form: Form, parts: list[Tensor]) -> Tensor:
    if form == "stacked":
        return torch.cat(parts)
    (tensor,) = parts
    if form == "conv":
        return tensor[:, :, None, None]
    return tensor.T if form == "transposed" else tensor


def original_name(name: str, modules: Mapping[str, str]) -> str | None:
    """`name` with the module at its beginning renamed; None if there is no rule for it."""
    module = name
    while module:
        module = module.rpartition(".")[0]
        if module in modules:
            return modules[module] + name.removeprefix(module)
    return None


def _rename(name: str, modules: Mapping[str, str], part: str) -> str:
    renamed = original_name(name, modules)
    if renamed is None:
        raise UserError(f"the {part}'s {name} has no name in the single-file layout: save a folder instead")
    return renamed


def _under(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{original}" for name, original in names.items()}


def _parameters(module: str) -> tuple[str, str]:
    return f"{module}.weight", f"{module}.bias"
