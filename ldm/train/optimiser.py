"""AdamW, in 8 bits where that is possible, and learning rates as functions of the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ldm.train.recipe import OptimiserSection


def make_optimiser(
    params: Iterable[Tensor] | Iterable[dict[str, Any]], options: OptimiserSection
) -> torch.optim.Optimizer:
    """AdamW over parameters, or over groups of them with their own ``lr``.

    With `use_8bit_adam` its moments take 2 bytes a parameter instead of 8 (bitsandbytes; Dettmers et al.
    2022, arXiv 2110.02861); without bitsandbytes or CUDA it warns and is torch's.
    """
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if options.use_8bit_adam:
        try:
            import bitsandbytes
        except ModuleNotFoundError:
            missing = "bitsandbytes is not installed"
        else:
            if torch.cuda.is_available():
                made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, **settings)
                return made
            missing = "there is no CUDA device"
        warnings.warn(f"use_8bit_adam: {missing}, so AdamW keeps its moments in 32 bits", stacklevel=2)
    return torch.optim.AdamW(params, **settings, fused=True)


def lr_factor(options: OptimiserSection, step: int, total: float) -> float:
    """What learning rates are multiplied by in step `step` (from 0) of `total`: 0 to 1.

    Every schedule starts with a linear warm-up ``step / lr_warmup_steps``. Then, with p from 0 to 1 over the
    rest of the run: constant: 1. linear: 1 - p. cosine: (1 + cos(pi p)) / 2. cosine_with_restarts: that,
    `lr_num_cycles` times over. polynomial: (1 - p)^lr_power. warmup_stable_decay: 1 until `lr_decay_from` of
    the run, then by a cosine to 2 %. The formulas of transformers' `get_scheduler`, whose `constant` has no
    warm-up and whose polynomial ends at 1e-7 and not at 0.
    """
    warmup = options.lr_warmup_steps
    if step < warmup:
        return step / warmup
    p = min(1.0, (step - warmup) / max(1, total - warmup))
    match options.lr_scheduler:
        case "linear":
            return 1 - p
        case "cosine":
            return (1 + math.cos(math.pi * p)) / 2
        case "cosine_with_restarts":
            return 0.0 if p == 1 else (1 + math.cos(math.pi * (options.lr_num_cycles * p % 1))) / 2
        case "polynomial":
            return float((1 - p) ** options.lr_power)
        case "warmup_stable_decay":
            through = max(0.0, step / total - options.lr_decay_from) / (1 - options.lr_decay_from)
            return 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, through))) / 2
        case _:
            return 1.0
