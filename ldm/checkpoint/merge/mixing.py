"""The arithmetic of a merge: what becomes of one tensor of several models, block by block of the U-Net.

Blocks have the names of merge-block-weighted and supermerger, which count as the original layout does: IN00
to IN11, M00 and OUT00 to OUT11 in SD 1 and 2, IN00 to IN08, M00 and OUT00 to OUT08 in XL; BASE is all else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.checkpoint.fill import widen
from ldm.checkpoint.keymap import original_name, unet_modules
from ldm.errors import UserError, abbreviate
from ldm.models.config import UNetConfig

BASE = "BASE"
# Weights of 0.333 are thirds, and those of 0.7 and 0.7 a mistake.
TOLERANCE = 2e-3

BlockWeights = Mapping[str, float] | Sequence[float]


@dataclass(frozen=True)
class Mix:
    """How models A, B, C, ... become one.

    weights: of each, and their sum is 1: `sum w_i x_i` (Wortsman et al. 2022, "Model soups").
    difference: or else M in `A + M (B - C)`: what training made of C to get B, upon A (Ilharco et al. 2023,
        "Editing models with task arithmetic").
    blocks: by block of the U-Net, the weight of B, or M, where it is another.
    """

    weights: tuple[float, ...] = ()
    difference: float | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, tensors: Sequence[Tensor], block: str) -> Tensor:
        """Tensors of one name and shape -> one, in fp32 or wider. A's alone keeps its bits."""
        wide = [widen(tensor) for tensor in tensors]
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in wide]
        if self.difference is not None:
            a, b, c = wide
            m = self.blocks.get(block, self.difference)
            return a if m == 0 else a.add(b.sub(c), alpha=m)
        share = self.blocks.get(block)
        return weighted_sum(wide, self.weights if share is None else (1 - share, share))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum w_i x_i` for weights whose sum is 1, as `x_0 + sum w_i (x_i - x_0)`.

    What is the same in all stays as it is, bit for bit; so does the one that has all the weight.
    """
    kept = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    (first, _), *others = kept
    total = first
    for tensor, weight in others:
        total = total.add(tensor.sub(first), alpha=weight)
    return total


def make_mix(
    count: int,
    weights: Sequence[float] | None,
    difference: float | None,
    block_weights: BlockWeights | None,
    unet: UNetConfig,
) -> Mix:
    """The mix that is asked for of `count` models. Raises UserError for weights that make none."""
    given = block_weights.values() if isinstance(block_weights, Mapping) else block_weights or ()
    for weight in (*(weights or ()), *given, difference or 0):
        if not math.isfinite(weight):
            raise UserError(f"a weight of {weight} is not a number to merge with")
    base, blocks = _blocks(block_weights, block_names(unet)) if block_weights is not None else (None, {})
    if difference is not None:
        if count != 3 or weights is not None:
            raise UserError("adding a difference, A + M (B - C), takes three models and no weights but M")
        if base is not None:
            raise UserError(f"M in A + M (B - C) is the weight of {BASE}: leave it out of the block weights")
        return Mix(difference=difference, blocks=blocks)
    if block_weights is not None:
        if count != 2:
            raise UserError(
                f"block weights are of the second of two models, or of a difference, not of {count}"
            )
        if (base is None) == (weights is None):
            raise UserError(
                f"beside block weights, all else needs one weight: as {BASE} among them, or alone"
            )
        weights = weights if base is None else [base]
    return Mix(weights=_shares(count, weights), blocks=blocks)


def _shares(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    """A weight for each model. Raises UserError unless there are as many, with a sum of 1."""
    if weights is None:
        return (1 / count,) * count
    if count == 2 and len(weights) == 1:
        return (1 - weights[0], weights[0])
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights for {count} models: give one for each")
    total = math.fsum(weights)
    if abs(total - 1) > TOLERANCE:
        same_ratio = ""
        if total > 0:
            same_ratio = f"; in the same ratio: {' '.join(f'{weight / total:.4g}' for weight in weights)}"
        raise UserError(
            f"the weights' sum is {total:.6g}, and must be 1, or the networks' layers are scaled{same_ratio}"
        )
    return tuple(weights) if total == 1 else tuple(weight / total for weight in weights)


# --- blocks ----------------------------------------------------------------------------------------------


def block_names(unet: UNetConfig) -> list[str]:
    """IN00, IN01, ..., M00, OUT00, ..., in the order of the U-Net."""
    layers = unet.per_level("layers_per_block")
    inputs, outputs = sum(layers) + len(layers), sum(layers) + len(layers)
    return [*_counted("IN", inputs), "M00", *_counted("OUT", outputs)]


def _counted(name: str, count: int) -> Iterable[str]:
    return (f"{name}{i:02}" for i in range(count))


def blocks_of(unet: UNetConfig, names: Iterable[str]) -> dict[str, str]:
    """The block of each of the U-Net's tensors.

    As merge-block-weighted has it, what comes before the first block (the time embedding) is of IN00, what
    comes after the last (`out`) is of the last OUT, and what it does not know (embeddings of sizes), of BASE.
    """
    modules, last = unet_modules(unet), block_names(unet)[-1]
    return {name: _block(original_name(name, modules) or "", last) for name in names}


def _block(original: str, last: str) -> str:
    if found := re.match(r"(in|out)put_blocks\.(\d+)\.", original):
        return f"{found[1].upper()}{int(found[2]):02}"
    starts = {"middle_block.": "M00", "time_embed.": "IN00", "out.": last}
    return next((block for start, block in starts.items() if original.startswith(start)), BASE)


def _blocks(given: BlockWeights, names: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """The weight of BASE, if it is given, and those of blocks. Raises UserError for others."""
    if isinstance(given, Mapping):
        blocks = {name.upper(): weight for name, weight in given.items()}
        if unknown := [name for name in blocks if name not in (BASE, *names)]:
            raise UserError(
                f"the U-Net has no {abbreviate(unknown)}: its blocks are {BASE}, {_ranges(names)}"
            )
    else:
        listed = [BASE, *names] if len(given) == len(names) + 1 else list(names)
        if len(given) != len(listed):
            raise UserError(
                f"{len(given)} block weights, and the U-Net has {len(names)} blocks, {_ranges(names)}: give "
                f"as many, with or without {BASE} in front, or name those that differ: OUT03=0.5"
            )
        blocks = dict(zip(listed, given, strict=True))
    return blocks.pop(BASE, None), blocks


def _ranges(names: Sequence[str]) -> str:
    """IN00 to IN11, M00, OUT00 to OUT11."""
    middle = names.index("M00")
    return f"{names[0]} to {names[middle - 1]}, M00, {names[middle + 1]} to {names[-1]}"
