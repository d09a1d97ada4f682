"""A base in 4 bits: the linear layers of a U-Net that stays as it is while a LoRA is trained beside it.

A weight is one of 16 levels, quantiles of a normal (NF4), times a scale that 64 weights share and that is
kept in 8 bits. Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314, section 3. The layers are
bitsandbytes': they compute with the weights as they were rounded, and pass gradients through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldm.adapters.layers import share
from ldm.errors import UserError, reason
from ldm.models import UNet
from ldm.runtime import Runtime

OPTION = "base_model_precision nf4-bnb"


def check_quantising(device: torch.device) -> None:
    """Raise UserError where 4 bits cannot be computed with."""
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"{OPTION} is for CUDA and processors, not for {device.type}: leave it out")
    _library()


def _library() -> Any:
    try:
        import bitsandbytes
    except ModuleNotFoundError:
        raise UserError(f"{OPTION} needs bitsandbytes: pip install 'ldm[bitsandbytes]'") from None
    except Exception as error:  # made for another CUDA, say
        raise UserError(f"{OPTION} needs bitsandbytes, which does not load: {reason(error)}") from None
    return bitsandbytes


def quantise(unet: UNet, runtime: Runtime) -> UNet:
    """A U-Net whose linear layers are in NF4 on `runtime`'s device; it shares all other tensors of `unet`.

    Weights are rounded as they are stored, one layer after the other. Raises UserError as `check_quantising`.
    """
    bnb, made = _library(), share(unet)
    for path, layer in list(made.named_modules()):
        if type(layer) is nn.Linear:
            made.set_submodule(path, _in_nf4(bnb, layer, runtime))
    flagged: Any = made
    flagged.is_loaded_in_4bit = True  # by which peft knows to put its layers for 4 bits beside them
    return made


def _in_nf4(bnb: Any, layer: nn.Linear, runtime: Runtime) -> Any:
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=runtime.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4").to(runtime.device)
    made.bias = layer.bias
    # For drawing it would lay weights out anew where there is AVX512-BF16; no gradient goes through these.
    made.support_avx512bf16_for_cpu = False
    return made.train(layer.training)
