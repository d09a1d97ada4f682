"""Layers of a U-Net by the short names that people give them, and what their attention is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from ldm.errors import UserError
from ldm.models import UNet
from ldm.models.attention import Attention

FORM = 'write "mid", "down.1", "up.0", or more of a layer\'s name, such as "up.0.attentions.1"'
_LONG = (("down", "down_blocks"), ("mid", "mid_block"), ("up", "up_blocks"))


def attention_layers(unet: UNet, names: Iterable[str], cross: bool) -> frozenset[str]:
    """Full names of those that attend to the text (`cross`) or to pixels, in the levels that are named.

    A name is the beginning of a layer's, as in diffusers' ``pag_applied_layers``; levels count as there, the
    way up from the deepest. Raises UserError for one that no layer has.
    """
    own = [name for name, layer in unet.named_modules() if isinstance(layer, Attention)]
    own = [name for name in own if is_cross(unet, name) == cross]
    return frozenset(name for asked in names for name in _begin(own, asked))


def is_cross(unet: UNet, name: str) -> bool:
    """Whether the attention of that name goes to the text."""
    block = unet.get_submodule(name.rpartition(".")[0])
    return name.endswith("attn2") or bool(getattr(block, "only_cross", False))


def _begin(names: list[str], asked: str) -> Iterator[str]:
    long = asked.strip()
    for short, full in _LONG:
        long = re.sub(rf"^(block_)?{short}(?=\.|$)", full, long)
    found = [name for name in names if f"{name}.".startswith(f"{long}.")]
    if not found:
        levels = dict.fromkeys(".".join(name.split(".")[:2]).removesuffix(".attentions") for name in names)
        raise UserError(f"no layer {asked!r} attends: {FORM}; this model has {', '.join(levels)}")
    yield from found


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) in fp32: [B, heads, N, d], [B, heads, M, d] -> [B, heads, N, M]."""
    q, k = q.float(), k.float()
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1)
