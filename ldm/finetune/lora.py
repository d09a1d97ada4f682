"""LoRA and its kin: a small change is trained beside a frozen model.

    h = W x + alpha / rank * B A x        Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3

or with LoHa's and LoKr's products in place of B A (`ldm.adapters.deltas`). The layers are peft's. Each
trained part becomes a new tree of modules which shares all frozen tensors with the old one, so that the old
one still draws as before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.layers import share
from ldm.adapters.names import ADAPTABLE, ENCODERS, UNET
from ldm.checkpoint import Parts
from ldm.diffusion.noise import torch_seed
from ldm.errors import UserError, reason
from ldm.finetune.blocks import block_of, check_blocks
from ldm.finetune.recipe import AdapterType

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# With the attention these are all layers of resnets, transformers and resampling, as LyCORIS has it in LoCon.
LOCON = (
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)
ADAPTER = "default"  # peft's name for a model's only adapter


# --- layers ----------------------------------------------------------------------------------------------


def add_lora(
    parts: Parts,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    conv: bool = False,
    dropout: float = 0.0,
    use_dora: bool = False,
    kind: AdapterType = "lora",
    ranks: Mapping[str, int] | None = None,
    text: bool = False,
    seed: int = 0,
) -> Parts:
    """Parts with LoRA layers, or LoHa's or LoKr's, in new modules that share all tensors of the given ones.

    The new tensors are fp32 and want a gradient; all others, which the given parts have too, want none. A
    begins as a normal of deviation 1 / rank and B as 0, as in diffusers' train_text_to_image_lora.py, LoHa
    and LoKr as in peft: what is drawn is the same at first.

    Args:
        rank: r of A [r, in] and B [out, r].
        alpha: the change is scaled by alpha / rank.
        targets: ends of names of linear layers and convolutions, such as "to_k", "attn2.to_k", "ff.net.2".
            Each part takes those that it has, or its default where it has none: to_q, to_k, to_v and to_out.0
            of the U-Net, q_proj, k_proj, v_proj and out_proj of text encoders.
        conv: beside them all other layers of the U-Net's resnets, transformers and resampling (`LOCON`):
            convolutions, time_emb_proj, feed-forward, proj_in and proj_out; none of text encoders. They are
            LoCon's in LyCORIS (Yeh et al. 2023, arXiv 2309.14859).
        dropout: probability by which inputs of A are dropped in training.
        use_dora: learn each weight's magnitude apart from its direction (Liu et al. 2024, arXiv 2402.09353).
        kind: what is beside a layer: LoRA, LoHa or LoKr.
        ranks: of blocks (`ldm.finetune.blocks`) that have another; 0: none. Alpha changes with them.
        text: train the text encoders too.
        seed: of what is random at first.

    Raises:
        UserError: for a target or block that no trained part has, or a target that is no linear layer or
            convolution.
        ModuleNotFoundError: if peft is not installed.
    """
    ranks = ranks or {}
    trained = [UNET, *(part for part in ENCODERS if text and getattr(parts, part) is not None)]
    for part in (UNET, "vae", *ENCODERS):
        if getattr(parts, part) is not None:
            getattr(parts, part).requires_grad_(False)
    whole = {part: getattr(parts, part) for part in trained}
    check_blocks("block_rank", ranks, whole)
    chosen = _choose_targets(whole, targets, conv)
    modules: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.default_generator.manual_seed(torch_seed(seed))
        for part in trained:
            own = ranks.get(part, rank)
            if own:
                config = _config(kind, own, alpha if own == rank else alpha * own / rank, dropout, use_dora)
                config.target_modules = set(chosen[part])
                if part == UNET and ranks:
                    _give_ranks(config, whole[part], ranks, alpha / rank)
                modules[part] = _inject(whole[part], config)
    return replace(parts, **modules)


def _config(kind: AdapterType, rank: int, alpha: Any, dropout: float, use_dora: bool) -> Any:
    """peft's, which calls alpha a whole number and divides it."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    if kind != "lora":
        return {"loha": LoHaConfig, "lokr": LoKrConfig}[kind](r=rank, alpha=alpha)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        init_lora_weights="gaussian",
    )


def _give_ranks(config: Any, unet: nn.Module, ranks: Mapping[str, int], scale: float) -> None:
    """Their own ranks to layers of some blocks, and none where it is 0."""
    layers = (
        path for path, _ in unet.named_modules() if any(_ends(path, each) for each in config.target_modules)
    )
    own = {path: ranks[block] for path in layers if (block := block_of(path, ranks)) is not None}
    config.exclude_modules = sorted(path for path, rank in own.items() if not rank) or None
    config.rank_pattern = {re.escape(path): rank for path, rank in own.items() if rank}
    config.alpha_pattern = {pattern: scale * rank for pattern, rank in config.rank_pattern.items()}


def _choose_targets(
    modules: Mapping[str, nn.Module], targets: Sequence[str] | None, conv: bool
) -> dict[str, list[str]]:
    """Names for peft, by part."""
    chosen = {}
    for part, module in modules.items():
        found = [target for target in targets or () if _named(module, target)]
        own = found or (ATTENTION if part == UNET else TEXT_ATTENTION)
        chosen[part] = [*own, *LOCON] if conv and part == UNET else list(own)
    for target in targets or ():
        layers = [layer for module in modules.values() for layer in _named(module, target)]
        if not layers or not all(isinstance(layer, ADAPTABLE) for layer in layers):
            fault = "names more than linear layers and convolutions" if layers else "is in no trained part"
            raise UserError(f"LoRA target {target!r} {fault}; there are {', '.join(_layer_names(modules))}")
    return chosen


def _named(module: nn.Module, target: str) -> list[nn.Module]:
    """What peft takes for a target: modules whose names end with it."""
    return [each for path, each in module.named_modules() if path and _ends(path, target)]


def _ends(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}")


def _layer_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The ends of layers' names: the last word, with the one before a number."""
    names = set()
    for module in modules.values():
        for path, layer in module.named_modules():
            if isinstance(layer, ADAPTABLE):
                before, last = f".{path}".split(".")[-2:]
                names.add(f"{before}.{last}" if last.isdigit() else last)
    return sorted(names)


def _inject(module: nn.Module, config: Any) -> nn.Module:
    from peft import inject_adapter_in_model

    adapted = share(module)
    try:
        inject_adapter_in_model(config, adapted, ADAPTER)
    except ValueError as error:  # peft's, where nothing is left
        raise UserError(f"no layer of the U-Net is trained: {reason(error)}") from None
    for _, layer in adapter_layers(adapted):
        # peft gives its tensors the dtype of the layer below.
        for p in layer.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        if getattr(config, "use_dora", False):
            _measure(layer)
        elif hasattr(layer, "_cast_input_dtype"):  # private to peft: without it the same, but slower
            layer._cast_input_dtype = _cast
    return adapted.train(module.training)


@torch.no_grad()
def _measure(layer: Any) -> None:
    """DoRA's magnitudes in fp32: rounded ones would change the model at once."""
    layer.lora_magnitude_vector[ADAPTER].update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[ADAPTER].weight,
        lora_B=layer.lora_B[ADAPTER].weight,
        scaling=layer.scaling[ADAPTER],
    )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """peft's cast of a layer's input to the dtype of A; under autocast, which would cast it back, none."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def adapter_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers in a module, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))


@contextmanager
def scaled(modules: Iterable[nn.Module | None], weight: float) -> Iterator[None]:
    """Within, what is beside the layers of `modules` counts `weight` times; without any nothing changes."""
    trained = (
        [] if weight == 1 else [layer for module in modules if module for _, layer in adapter_layers(module)]
    )
    before = [layer.scaling[ADAPTER] for layer in trained]
    try:
        for layer, scale in zip(trained, before, strict=True):
            layer.scaling[ADAPTER] = weight * scale
        yield
    finally:
        for layer, scale in zip(trained, before, strict=True):
            layer.scaling[ADAPTER] = scale
