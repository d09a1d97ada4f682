"""Calls of networks as drawing makes them, of tensors without numbers: for `ldm.memory.trace.peak`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ldm.kernels.convolution import Conv2d
from ldm.memory.trace import META, on_meta
from ldm.models import VAE, ControlNet, UNet, vae_bands
from ldm.models.attention import Attention, SpatialTransformer
from ldm.models.clip import CLIPTextModel
from ldm.models.control import ControlNetUnion

Call = Callable[[], object]
WINDOW = 77  # tokens of a text encoder, where the model has none


def text(encoder: CLIPTextModel, rows: int) -> Call:
    """A text encoder's, of so many windows."""
    meta = on_meta(encoder)
    ids = torch.zeros(rows, encoder.config.max_position_embeddings, dtype=torch.long, device=META)
    return lambda: meta(ids)


def unet(
    module: UNet | ControlNet,
    rows: int,
    size: Iterable[int],
    tokens: int,
    numbers: int,
    sliced: bool,
    packs: bool,
) -> Call:
    """The U-Net's or a ControlNet's, of so many rows of latents of that size; SDXL is told `numbers`."""
    meta, config = on_meta(module), module.config
    set_sliced(meta, sliced)
    set_packs(meta, packs)
    dtype = meta.conv_in.weight.dtype

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(rows, *shape, dtype=of, device=META)

    extra: dict[str, Tensor] = {}
    if "time_ids" in config.conditioning:
        width = config.projection_class_embeddings_input_dim or 0
        pooled = empty(width - numbers * (config.addition_time_embed_dim or 0))
        extra = {"pooled": pooled, "time_ids": empty(numbers, of=torch.float32)}
    if "class_labels" in config.conditioning:
        extra["class_labels"] = empty(of=torch.long)
    if config.time_cond_proj_dim is not None:
        extra["timestep_cond"] = empty(config.time_cond_proj_dim)
    sample = empty(config.in_channels, *size).to(memory_format=torch.channels_last)
    context = empty(tokens, config.per_level("cross_attention_dim")[0])
    if isinstance(meta, ControlNet):
        hint = empty(config.block_out_channels[0], *size)
        beside = {"hints": [hint]} if isinstance(meta, ControlNetUnion) else {"hint": hint}
        return lambda: meta(sample, torch.empty((), device=META), context, **beside, **extra)
    return lambda: meta(sample, torch.empty((), device=META), context, **extra)


def vae(module: VAE, batch: int, size: tuple[int, int], free: int, packs: bool, *, decode: bool) -> Call:
    """The VAE's, of a batch of pictures of `size`, with so many bytes free."""
    meta, (height, width), factor = on_meta(module), size, module.downscale
    set_packs(meta, packs)
    small = (module.latent_channels, height // factor, width // factor)
    shape = small if decode else (3, height, width)
    given = torch.empty(batch, *shape, dtype=next(meta.parameters()).dtype, device=META)
    given = given.to(memory_format=torch.channels_last)
    return lambda: (vae_bands.decode if decode else vae_bands.encode)(meta, given, free)


def set_sliced(network: nn.Module, sliced: bool) -> None:
    """Whether transformers take the rows of a batch one by one, and heads where a kernel holds all scores."""
    for module in network.modules():
        if isinstance(module, SpatialTransformer | Attention):
            module.sliced = sliced


def set_packs(network: nn.Module, packs: bool) -> None:
    """Whether copies of convolutions' weights may be kept for kernels."""
    for module in network.modules():
        if isinstance(module, Conv2d):
            module.packs = packs
