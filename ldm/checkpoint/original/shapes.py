"""Configs from the shapes of tensors in the original layout: all of a config that shapes can tell."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

Tensors = Mapping[str, Tensor]

HEAD_CHANNELS = 64  # of each attention head, in all text encoders and in the U-Nets of SD 2 and XL


class Block(NamedTuple):
    """A resnet on the U-Net's way down, with a transformer after it or not."""

    name: str  # input_blocks.4
    channels: int
    depth: int  # transformer blocks


def shape_of(part: str, tensors: Tensors, base: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `part`'s config that its tensors tell.

    Args:
        part: "unet", "controlnet", "vae", "text_encoder" or "text_encoder_2".
        tensors: the part's, by their original names without a prefix.
        base: the config of its family, for what depends on the family.

    Raises:
        KeyError: a tensor without which nothing can be told.
        IndexError: one of them has too few dimensions.
    """
    if part == "unet":
        return _unet(tensors, base) | {"out_channels": tensors["out.2.weight"].shape[0]}
    if part == "controlnet":
        return _controlnet(tensors, base)
    if part == "vae":
        return _vae(tensors)
    return _open_clip(tensors, base) if is_open_clip(tensors) else _clip(tensors)


def is_open_clip(tensors: Tensors) -> bool:
    """Whether a text encoder is stored as OpenCLIP names it, or else as transformers does."""
    return any(name.startswith("transformer.resblocks.") for name in tensors)


# --- the U-Net -------------------------------------------------------------------------------------------


def _unet(tensors: Tensors, base: Mapping[str, Any]) -> dict[str, Any]:
    levels = _levels(tensors)
    channels, depths = [level[0].channels for level in levels], [level[0].depth for level in levels]
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    depths[-1] = _depth(tensors, "middle_block.1")  # the middle has the coarsest level's
    middle = "middle_block.1.transformer_blocks.0"
    shape: dict[str, Any] = {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": channels,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": _once([len(level) for level in levels]),
        "transformer_layers_per_block": _depths(depths),
        "cross_attention_dim": tensors[f"{middle}.attn2.to_k.weight"].shape[1],
        "use_linear_projection": tensors["middle_block.1.proj_in.weight"].ndim == 2,
    }
    if isinstance(base["attention_head_dim"], list):
        shape["attention_head_dim"] = [max(1, c // HEAD_CHANNELS) for c in channels]
    if any(text_only := [_attends_to_text_only(tensors, level[0]) for level in levels]):
        # Where a level has no attention the value means nothing: as in the published config.
        shape["only_cross_attention"] = [yes or not kind for yes, kind in zip(text_only, kinds, strict=True)]
    for key, name, axis in (
        ("num_class_embeds", "label_emb.weight", 0),
        ("projection_class_embeddings_input_dim", "label_emb.0.0.weight", 1),
        ("time_cond_proj_dim", "time_embed.cond_proj.weight", 1),
    ):
        if name in tensors:
            shape[key] = tensors[name].shape[axis]
    return shape


def _controlnet(tensors: Tensors, base: Mapping[str, Any]) -> dict[str, Any]:
    shape = {key: value for key, value in _unet(tensors, base).items() if key != "up_block_types"}
    return shape | hint_shape(tensors)


def hint_shape(tensors: Tensors) -> dict[str, Any]:
    """Of the layers of a ControlNet that see the picture. Raises KeyError."""
    count = _count(tensors, "input_hint_block.{}.weight", 2)
    widths = [tensors[f"input_hint_block.{2 * k}.weight"].shape[0] for k in range(max(1, count - 1))]
    return {
        "conditioning_channels": tensors["input_hint_block.0.weight"].shape[1],
        "conditioning_embedding_out_channels": widths[::2],
    }


def _levels(tensors: Tensors) -> list[list[Block]]:
    """The U-Net's way down: a downsampling ends a level."""
    levels: list[list[Block]] = [[]]
    for i in itertools.count(1):
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in tensors:
            levels.append([])
        elif (name := f"{block}.0.out_layers.3.weight") in tensors:
            levels[-1].append(Block(block, tensors[name].shape[0], _depth(tensors, f"{block}.1")))
        elif levels[-1]:
            return levels
        else:
            raise KeyError(name)
    raise AssertionError


def _depth(tensors: Tensors, transformer: str) -> int:
    return _count(tensors, f"{transformer}.transformer_blocks.{{}}.norm1.weight")


def _attends_to_text_only(tensors: Tensors, block: Block) -> bool:
    """Whether what is self-attention elsewhere takes its keys from the text too (x4 upscaler)."""
    attention = f"{block.name}.1.transformer_blocks.0.attn1"
    if not block.depth:
        return False
    return tensors[f"{attention}.to_k.weight"].shape[1] != tensors[f"{attention}.to_q.weight"].shape[1]


def _depths(depths: list[int]) -> int | list[int]:
    """Levels that do not attend (0) may have any number: that of the others if they agree, or else 1."""
    attending = {*depths} - {0}
    return attending.pop() if len(attending) == 1 else [depth or 1 for depth in depths]


# --- the others ------------------------------------------------------------------------------------------


def _vae(tensors: Tensors) -> dict[str, Any]:
    levels = list(_vae_levels(tensors))
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [channels for channels, _ in levels],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": _once([layers for _, layers in levels]),
    }


def _vae_levels(tensors: Tensors) -> Iterator[tuple[int, int]]:
    """(channels, resnets) of each level of the encoder."""
    for level in range(_count(tensors, "encoder.down.{}.block.0.conv2.weight")):
        block = f"encoder.down.{level}.block"
        layers = _count(tensors, f"{block}.{{}}.conv2.weight")
        yield tensors[f"{block}.0.conv2.weight"].shape[0], layers


def _clip(tensors: Tensors) -> dict[str, Any]:
    layers = "text_model.encoder.layers"
    return _text(
        tensors["text_model.embeddings.token_embedding.weight"],
        tensors["text_model.embeddings.position_embedding.weight"],
        tensors[f"{layers}.0.mlp.fc1.weight"],
        _count(tensors, f"{layers}.{{}}.mlp.fc1.weight"),
    )


def _open_clip(tensors: Tensors, base: Mapping[str, Any]) -> dict[str, Any]:
    layers = "transformer.resblocks"
    shape = _text(
        tensors["token_embedding.weight"],
        tensors["positional_embedding"],
        tensors[f"{layers}.0.mlp.c_fc.weight"],
        # SD 2 does not use the last of 24; a file may leave it out.
        min(_count(tensors, f"{layers}.{{}}.mlp.c_fc.weight"), base["num_hidden_layers"]),
    )
    if base["architectures"] == ["CLIPTextModelWithProjection"]:
        shape["projection_dim"] = tensors["text_projection"].shape[1]
    return shape


def _text(tokens: Tensor, positions: Tensor, first: Tensor, layers: int) -> dict[str, Any]:
    vocabulary, width = tokens.flatten(1).shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": first.shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD_CHANNELS),
        "max_position_embeddings": positions.numel() // width,
    }


def _count(tensors: Tensors, pattern: str, step: int = 1) -> int:
    """How many of pattern.format(0), pattern.format(step), ... there are without a gap."""
    return next(n for n in itertools.count() if pattern.format(step * n) not in tensors)


def _once(values: list[int]) -> int | list[int]:
    """One number where all are the same, as published configs have it."""
    return values[0] if len({*values}) == 1 else values
