"""Optimisers by name, Muon, and learning rates as functions of the step."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError, reason
from ldm.train.recipe import OptimiserSection

PRODIGYS_LEAST = 0.1  # below it, learning_rate was meant for another optimiser


def check_optimiser(options: OptimiserSection) -> None:
    """Raise UserError where `make_optimiser` would, before anything else is done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again
        make_optimiser([torch.zeros(1, requires_grad=True)], options)


def make_optimiser(
    params: Iterable[Tensor] | Iterable[dict[str, Any]], options: OptimiserSection
) -> torch.optim.Optimizer:
    """The recipe's optimiser over parameters, or over groups of them with their own ``lr``.

    Raises:
        UserError: where its library is missing, or does not take what `optimizer_args` say.
    """
    name = options.chosen_optimizer
    try:
        return _made(name, params, options)
    except ModuleNotFoundError as error:
        raise UserError(f"optimizer {name} needs {error.name}: pip install 'ldm[optimisers]'") from None
    except (TypeError, ValueError, AssertionError) as error:
        given = " ".join(options.optimizer_args) or f"learning_rate={options.learning_rate:g}"
        raise UserError(f"optimizer {name} does not take {given}: {reason(error)}") from None


def _made(name: str, params: Any, options: OptimiserSection) -> torch.optim.Optimizer:
    lr: dict[str, Any] = {"lr": options.learning_rate}
    made: torch.optim.Optimizer
    match name:
        case "prodigy":
            from prodigyopt import Prodigy

            if options.learning_rate < PRODIGYS_LEAST:
                text = (
                    f"prodigy multiplies what it finds by learning_rate {options.learning_rate:g}: 1 is usual"
                )
                warnings.warn(text, stacklevel=4)
            made = Prodigy(params, **lr | options.optimizer_settings)
        case "adafactor":
            from transformers.optimization import Adafactor

            # By default it would go by rates of its own, whatever `learning_rate` says.
            made = Adafactor(
                params, **lr | {"scale_parameter": False, "relative_step": False} | options.optimizer_settings
            )
        case "lion":
            from lion_pytorch import Lion

            made = Lion(params, **lr | options.optimizer_settings)
        case "schedulefree_adamw":
            from schedulefree import AdamWScheduleFree

            made = AdamWScheduleFree(params, **lr | options.optimizer_settings)
        case _:
            made = _adamw(name, params, options)
    return made


def _adamw(name: str, params: Any, options: OptimiserSection) -> torch.optim.Optimizer:
    """AdamW, Muon beside it, or AdamW whose moments take 2 bytes a parameter instead of 8.

    That is of bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861); without it or CUDA it warns, and is
    torch's.
    """
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    } | options.optimizer_settings
    if name == "muon":
        return Muon(params, **settings)
    if name == "adamw8bit":
        try:
            import bitsandbytes
        except ModuleNotFoundError:
            missing = "bitsandbytes is not installed"
        except Exception as error:  # made for another CUDA, say
            missing = f"bitsandbytes does not load ({error})"
        else:
            if torch.cuda.is_available():
                made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, **settings)
                return made
            missing = "there is no CUDA device"
        warnings.warn(f"adamw8bit: {missing}, so AdamW keeps its moments in 32 bits", stacklevel=4)
    return torch.optim.AdamW(params, **{"fused": True} | settings)


class Muon(torch.optim.AdamW):
    """Momentum made orthogonal for matrices and convolutions, AdamW for the rest (Jordan et al. 2024).

    A group with ``muon=False`` (an embedding, say) is left to AdamW, and so is what has fewer rows or columns
    than `THINNEST` (a last convolution, a LoRA of low rank). An update has the root mean square 0.2 that
    AdamW's usually has, so learning rates and weight decay are AdamW's (Liu et al. 2025, arXiv 2502.16982).
    torch's own Muon takes no convolutions.
    """

    THINNEST = 32
    MOMENTUM = 0.95

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], **settings: Any) -> None:
        given: list[Any] = list(params)
        groups: list[dict[str, Any]] = []
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            whole = group.get("muon", True)
            for muon in (True, False):
                some = [
                    p for p in group["params"] if (whole and min(_matrix(p).shape) >= self.THINNEST) == muon
                ]
                groups += [group | {"params": some, "muon": muon}] if some else []
        super().__init__(groups, **settings, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["step"] = torch.zeros(())  # AdamW asks for it where a state is loaded
                state["momentum"].lerp_(p.grad, 1 - self.MOMENTUM)
                ahead = _matrix(p.grad.lerp(state["momentum"], self.MOMENTUM))  # Nesterov's
                alike[ahead.shape].append((p, ahead))
        for shape, some in alike.items():
            updates = _shared(torch.stack([ahead for _, ahead in some]))
            for (p, _), update in zip(some, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_like(update, p), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of U S V^T, for [N, m, n]: five steps of Newton and Schulz in bf16, with Jordan's numbers.

    The same steps on the smaller Gram matrix are twice as fast, and blow small singular values up.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    near: Tensor = x.mT if tall else x
    return near.type_as(matrices)


def _shared(matrices: Tensor) -> Tensor:
    """`orthogonal` of [N, m, n], of which each process makes its share, passed on in bf16."""
    if not (dist.is_available() and dist.is_initialized()):
        return orthogonal(matrices)
    processes, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(matrices) // processes)
    filled = F.pad(matrices, (0, 0, 0, 0, 0, share * processes - len(matrices)))
    mine = orthogonal(torch.split(filled, share)[rank]).bfloat16().contiguous()
    parts = [torch.empty_like(mine) for _ in range(processes)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: len(matrices)].type_as(matrices)


def _matrix(p: Tensor) -> Tensor:
    """[outputs, all else] of a weight, in the order of channels_last; [n, 1] of a vector."""
    return p.permute(0, 2, 3, 1).flatten(1) if p.ndim == 4 else p.reshape(len(p) if p.ndim else 1, -1)


def _like(matrix: Tensor, p: Tensor) -> Tensor:
    """What `_matrix` made of a weight, in the weight's shape."""
    if p.ndim != 4:
        return matrix.view_as(p)
    return matrix.view(p.shape[0], *p.shape[2:], p.shape[1]).permute(0, 3, 1, 2)


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
