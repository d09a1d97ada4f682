"""Single files of networks of pictures: what their names and shapes tell, and their tensors by our names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.fill import unfilled
from ldm.checkpoint.keymap import control_modules, original_name, unet_modules
from ldm.checkpoint.original.component import refuse
from ldm.checkpoint.original.shapes import Tensors
from ldm.errors import UserError
from ldm.models import ControlNet, UNet
from ldm.models.control import LLLite, LLLiteLayer

LLLITE = "lllite_unet_"
MARK = "lora_controlnet"  # of control-loras


def count(tensors: Tensors, pattern: str) -> int:
    """How many modules pattern.format(0), pattern.format(1), ... have tensors, without a gap."""
    return next(
        n for n in itertools.count() if not any(name.startswith(pattern.format(n)) for name in tensors)
    )


def shape_by_names(tensors: Tensors, path: Path) -> dict[str, Any]:
    """What the shapes of a ControlNet's tensors tell of its config, by diffusers' names. Raises UserError."""
    try:
        return _shape_by_names(tensors)
    except KeyError as error:
        raise UserError(f"{path}: tensor {error.args[0]} is missing; is the file complete?") from None


def _shape_by_names(tensors: Tensors) -> dict[str, Any]:
    levels = [f"down_blocks.{k}" for k in range(count(tensors, "down_blocks.{}."))]
    depths = [count(tensors, f"{level}.attentions.0.transformer_blocks.{{}}.") for level in levels]
    middle = count(tensors, "mid_block.attentions.0.transformer_blocks.{}.")
    hint, widths = "controlnet_cond_embedding", []
    for k in range(count(tensors, f"{hint}.blocks.{{}}.") // 2):
        widths.append(tensors[f"{hint}.blocks.{2 * k}.weight"].shape[0])
    shape: dict[str, Any] = {
        "_class_name": "ControlNetUnionModel" if "task_embedding" in tensors else "ControlNetModel",
        "in_channels": tensors["conv_in.weight"].shape[1],
        "block_out_channels": [tensors[f"{level}.resnets.0.conv2.weight"].shape[0] for level in levels],
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in depths],
        "layers_per_block": count(tensors, "down_blocks.0.resnets.{}."),
        "transformer_layers_per_block": [depth or 1 for depth in (*depths[:-1], middle or depths[-1])],
        "conditioning_channels": tensors[f"{hint}.conv_in.weight"].shape[1],
        "conditioning_embedding_out_channels": [*widths, tensors[f"{hint}.conv_out.weight"].shape[1]],
    }
    for name, tensor in tensors.items():
        if name.endswith("attn2.to_k.weight"):
            shape["cross_attention_dim"] = tensor.shape[1]
    if "task_embedding" in tensors:
        kinds, width = tensors["task_embedding"].shape
        layers = count(tensors, "transformer_layes.{}.")
        shape |= {"num_control_type": kinds, "num_trans_channel": width, "num_trans_layer": layers}
        shape["num_proj_channel"] = tensors["spatial_ch_projs.weight"].shape[0]
    elif not middle:
        shape["mid_block_type"] = "UNetMidBlock2D"
    return shape


# --- T2I-Adapter -------------------------------------------------------------------------------------------


def adapter_of(tensors: Tensors, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A T2I-Adapter's tensors by diffusers' names, and its config: TencentARC's files, or diffusers'."""
    light = not any(re.match(r"(adapter\.)?conv_in\.", name) for name in tensors)
    flat = not any(".resnets." in name for name in tensors) and not light
    renamed = {}
    for name, tensor in tensors.items():
        new = name if name.startswith("adapter.") else f"adapter.{name}"
        new = re.sub(r"(body\.\d+)\.body\.", r"\1.resnets.", new)
        if flat:  # levels of two blocks one after the other
            new = re.sub(
                r"body\.(\d+)\.block", lambda m: f"body.{int(m[1]) // 2}.resnets.{int(m[1]) % 2}.block", new
            )
            new = re.sub(r"body\.(\d+)\.in_conv", lambda m: f"body.{int(m[1]) // 2}.in_conv", new)
        renamed[new] = tensor
    levels = count(renamed, "adapter.body.{}.")
    try:
        wide = [
            renamed[f"adapter.body.{k}.{'out_conv' if light else 'resnets.0.block1'}.weight"].shape[0]
            for k in range(levels)
        ]
        first = renamed["adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"].shape[1]
    except KeyError as error:
        raise UserError(f"{path}: tensor {error.args[0]} is missing; is the file complete?") from None
    factor = 16 if first in (256, 768) else 8
    kind = "light_adapter" if light else "full_adapter_xl" if factor == 16 else "full_adapter"
    config = {
        "_class_name": "T2IAdapter",
        "in_channels": first // factor**2,
        "channels": wide[:-1] if light else wide,
        "num_res_blocks": count(renamed, "adapter.body.0.resnets.{}."),
        "downscale_factor": factor,
        "adapter_type": kind,
    }
    return renamed, config


# --- LLLite ------------------------------------------------------------------------------------------------


def lllite_of(tensors: Tensors, path: Path, unet: UNet) -> tuple[LLLite, dict[str, Tensor]]:
    """kohya's LLLite for a U-Net, on the meta device, and its tensors by our names. Raises UserError."""
    modules, places = unet_modules(unet.config), dict[str, str]()
    for place, layer in unet.named_modules():
        if isinstance(layer, nn.Linear):
            theirs = original_name(f"{place}.weight", modules) or ""
            for name in (place, theirs.removesuffix(".weight")):
                places[LLLITE + name.replace(".", "_")] = place
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer_name, _, role = name.partition(".")
        found.setdefault(layer_name, {})[role.removeprefix("lllite_")] = tensor
    refuse("of layers that this model has not", [name for name in found if name not in places], path)
    layers: dict[str, LLLiteLayer] = {}
    renamed: dict[str, Tensor] = {}
    for k, (name, roles) in enumerate(found.items()):
        try:
            with unfilled():
                layer = LLLiteLayer({role: tensor.shape for role, tensor in roles.items()})
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(
                f"{path}: {name} has {', '.join(roles)}, not those of an LLLite of linear layers"
            ) from None
        wide = unet.get_submodule(places[name]).get_parameter("weight").shape[1]
        if (own := roles["up.0.weight"].shape[0]) != wide:
            raise UserError(f"{path}: {name} is of a layer of {own} channels, and this model's has {wide}")
        layers[places[name]] = layer
        renamed |= {f"layers.{k}.{role}": tensor for role, tensor in roles.items()}
    with unfilled():
        return LLLite(layers), renamed


# --- control-lora ------------------------------------------------------------------------------------------


def control_lora_of(
    tensors: Tensors, path: Path, network: ControlNet, unet: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A ControlNet's weights: those that are there, the U-Net's plus `up` times `down`, or the U-Net's own.

    Raises UserError naming tensors that fit nothing.
    """
    modules, made, used = control_modules(network.config), dict[str, Tensor](), {MARK}
    for name, wanted in network.state_dict().items():
        theirs = str(original_name(name, modules))
        stem = theirs.removesuffix(".weight")
        if theirs in tensors:
            made[name] = tensors[theirs]
            used.add(theirs)
            continue
        if name not in unet:
            raise UserError(f"{path}: tensors missing: {theirs}")
        made[name] = unet[name].detach().cpu()
        if stem != theirs and f"{stem}.up" in tensors and f"{stem}.down" in tensors:
            up, down = (tensors[f"{stem}.{part}"].float().flatten(1) for part in ("up", "down"))
            if (up.shape[0], down.shape[1]) != (wanted.shape[0], wanted[0].numel()) or up.shape[
                1
            ] != down.shape[0]:
                raise UserError(f"{path}: {stem}.up and .down do not fit this model's {list(wanted.shape)}")
            made[name] = made[name].float() + torch.mm(up, down).reshape(wanted.shape)
            used |= {f"{stem}.up", f"{stem}.down"}
    refuse("not of this model", [name for name in tensors if name not in used], path)
    return made
