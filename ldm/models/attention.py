"""Attention, and the spatial transformer in which latents attend to themselves and to the text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.kernels import native
from ldm.kernels.convolution import Conv2d
from ldm.models.layers import FeedForward, GroupNorm, by_rows
from ldm.models.merging import merged

T = TypeVar("T")

# Scores per head (queries x keys), by bytes a number, up to which plain attention trains faster on a CPU.
PLAIN_SCORES = {2: 512 * 1024, 4: 256 * 256}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v  (Vaswani et al. 2017, equation 1).

    Args:
        q: [B, heads, N, d].
        k, v: [B, heads, M, d].

    Returns:
        [B, heads, N, d].
    """
    if q.is_cuda and (out := _by_xformers(q, k, v)) is not None:
        return out
    if native.fits(q, k, v, dtypes=(torch.bfloat16,)) and native.has_attention():
        return native.attention(q, k, v)
    # On CPU the backward of SDPA is slow for the few tokens of small latents; without a gradient SDPA wins.
    wants_gradient = torch.is_grad_enabled() and q.requires_grad
    few = q.shape[2] * k.shape[2] <= PLAIN_SCORES.get(q.element_size(), 0)
    if q.device.type == "cpu" and wants_gradient and few:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)
        return torch.matmul(weights, v)
    return F.scaled_dot_product_attention(q, k, v)


def _by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """What xformers makes of it, or None where it cannot: its kernels are for some cards, shapes and dtypes.

    Which ones is its own affair, so each is tried once. With a gradient it is not asked, as it would fail
    only in the backward pass; nor by torch.compile, which knows SDPA.
    """
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if gradient or torch.compiler.is_compiling() or (efficient := _xformers()) is None:
        return None
    asked = (q.shape, k.shape, v.shape, q.dtype, q.device)
    if asked in _REFUSED:
        return None
    try:
        out: Tensor = efficient(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not _REFUSED:
            _warn(f"no kernel for queries {list(q.shape)} in {str(q.dtype)[6:]}", error)
        _REFUSED.add(asked)
        return None
    return out.transpose(1, 2)


_REFUSED: set[tuple[object, ...]] = set()  # what xformers has failed with, in this process


@cache
def _xformers() -> Callable[..., Tensor] | None:
    """xformers' kernel, which takes [B, N, heads, d], or None where it is not installed or does not load."""
    if find_spec("xformers") is None:
        return None
    try:
        kernel: Callable[..., Tensor] = import_module("xformers.ops").memory_efficient_attention
    except Exception as error:  # made for another torch, say
        _warn("it does not load", error)
        return None
    return kernel


def _warn(what: str, error: Exception) -> None:
    first = str(error).strip().partition("\n")[0]
    warnings.warn(f"xformers: {what}, so torch's own attention is used ({first})", stacklevel=4)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, N, d] -> [B, N, heads * d]."""
    return x.transpose(1, 2).flatten(2)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]: free where x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H W, C] -> [B, C, H, W], channels_last, always free."""
    return tokens.reshape(tokens.shape[0], height, width, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Site:
    """Where in a network attention takes place."""

    layer: Attention
    size: tuple[int, int]  # (height, width) of the picture whose pixels ask
    cross: bool  # whether they ask the text, and not each other


# What may be done in `attend`'s place: (site, q, k, v) -> [B, heads, N, d].
Attend = Callable[[Site, Tensor, Tensor, Tensor], Tensor]


def plainly(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The `Attend` that is `attend`, wherever it takes place."""
    return attend(q, k, v)


# On the way up of a U-Net, at a level counted from the deepest: what comes from below [B, C, H, W] and from
# beside [B, D, H, W] -> both, changed.
Meet = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
LeftOut = Mapping[str, Sequence[slice]]
NOTHING: LeftOut = {}


class Context:
    """A text embedding [B, M, D] that many calls of a network read, and what its layers make of it, once.

    It is of one drawing, as a layer's weights must stay what they are.

    Args:
        attend: what the layers that read it do in place of `attend`, and those beside them.
        meet: what is done on the way up of a U-Net that reads it.
        left_out: name of a transformer block -> the rows of a batch that go on as they come in.
    """

    def __init__(
        self,
        tokens: Tensor,
        attend: Attend | None = None,
        meet: Meet | None = None,
        left_out: LeftOut = NOTHING,
    ) -> None:
        self.tokens, self.attend, self.meet, self.left_out = tokens, attend, meet, left_out
        self._made: dict[nn.Module, Any] = {}

    def once(self, layer: nn.Module, make: Callable[[Tensor], T]) -> T:
        """What `make` makes of the tokens for this layer."""
        if layer not in self._made:
            self._made[layer] = make(self.tokens)
        made: T = self._made[layer]
        return made

    def __getitem__(self, rows: slice) -> Tensor:
        """Some of the rows, for one call."""
        return self.tokens[rows]


AnyText = Tensor | Context


def instead(context: AnyText) -> Attend | None:
    """What layers that read this do in place of `attend`."""
    return context.attend if isinstance(context, Context) else None


class Attention(nn.Module):
    """Multi-head attention of tokens [B, N, dim] to a context [B, M, context_dim], or to themselves."""

    sliced = False  # where a kernel holds all scores, one head at a time, in less memory
    name = ""  # in the U-Net, as `state_dict` has it: of a copy too

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self,
        x: Tensor,
        context: AnyText | None = None,
        by: Attend | None = None,
        size: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """`by` is what is done in place of `attend`, and `size` the picture's whose pixels are x."""
        q = split_heads(self.to_q(x), self.heads)
        if isinstance(context, Context):
            k, v = context.once(self, self._keys_and_values)
        else:
            k, v = self._keys_and_values(x if context is None else context)
        if by is not None:
            attended = by(Site(self, size, cross=context is not None), q, k, v)
        elif self.sliced and q.device.type == "mps":  # whose kernel holds the scores of all heads
            each = zip(*(torch.split(a, 1, dim=1) for a in (q, k, v)), strict=True)
            attended = torch.cat([attend(*head) for head in each], dim=1)
        else:
            attended = attend(q, k, v)
        out: Tensor = self.to_out[0](merge_heads(attended))
        return out

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, context_dim] -> [B, heads, M, d] each."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)


class TransformerBlock(nn.Module):
    """[B, N, dim] -> [B, N, dim]: self-attention, cross-attention, feed-forward, each added to its input.

    Args:
        only_cross: the first attention goes to the text too (x4 upscaler, where pixels are many).
    """

    def __init__(self, dim: int, context_dim: int, heads: int, only_cross: bool = False) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, context_dim if only_cross else dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self, x: Tensor, context: AnyText, size: tuple[int, int] = (0, 0), merging: float = 0.0
    ) -> Tensor:
        """`merging` is the share of the tokens, of a picture of `size`, that self-attention merges."""
        by, given = instead(context), x
        if merging and not self.only_cross:
            x = x + merged(self.attn1, self.norm1(x), size, merging)
        else:
            x = x + self.attn1(self.norm1(x), context if self.only_cross else None, by, size)
        x = x + self.attn2(self.norm2(x), context, by, size)
        out: Tensor = x + self.ff(self.norm3(x))
        if isinstance(context, Context) and context.left_out:
            for rows in context.left_out.get(self.attn1.name.rpartition(".")[0], ()):
                out[rows] = given[rows]
        return out


class SpatialTransformer(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]: pixels attend to each other and to the text.

    Rombach et al. 2022, section 3.3.

    Args:
        depth: transformer blocks.
        linear: enter and leave by linear layers instead of 1 x 1 convolutions.
        only_cross: attend to the text only.
    """

    sliced = False  # one row of a batch at a time, in less memory

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        depth: int = 1,
        groups: int = 32,
        linear: bool = False,
        only_cross: bool = False,
    ) -> None:
        super().__init__()
        inner = channels // heads * heads
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, context_dim, heads, only_cross) for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, channels) if linear else Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, context: AnyText, merging: float = 0.0) -> Tensor:
        if self.sliced and len(x) > 1 and instead(context) is None:
            out = torch.empty_like(x)
            for i in range(len(x)):
                out[i : i + 1] = self._rows(x[i : i + 1], context[i : i + 1], merging)
            return out
        return self._rows(x, context, merging)

    def _rows(self, x: Tensor, context: AnyText, merging: float) -> Tensor:
        height, width = x.shape[2:]
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, (height, width), merging)
        if self.linear:
            return x + to_image(self.proj_out(tokens), height, width)
        out: Tensor = x + self.proj_out(to_image(tokens, height, width))
        return out


class ImageAttention(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]: one head of self-attention over pixels, as in the middle of the VAE."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.group_norm(x))
        q, k, v = (split_heads(to(tokens), 1) for to in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out[0](merge_heads(attend(q, k, v)))
        return x + to_image(out, *x.shape[2:])


class AttentionPooling(nn.Module):
    """[B, N, D] -> [B, D]: the mean token attends to itself and to all tokens (DeepFloyd IF)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(1, dim))
        nn.init.normal_(self.positional_embedding, std=dim**-0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding.to(tokens.dtype)
        tokens = torch.cat([mean, tokens], dim=1)
        q, k, v = by_rows(self.q_proj, mean), self.k_proj(tokens), self.v_proj(tokens)
        q, k, v = (split_heads(a, self.heads) for a in (q, k, v))
        return merge_heads(attend(q, k, v))[:, 0]


class TextTimeEmbedding(nn.Module):
    """[B, N, D] text -> [B, time_dim], to be added to the time embedding."""

    def __init__(self, dim: int, time_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.pool = AttentionPooling(dim, heads)
        self.proj = nn.Linear(dim, time_dim)
        self.norm2 = nn.LayerNorm(time_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.norm2(by_rows(self.proj, self.pool(self.norm1(tokens))))
        return out
