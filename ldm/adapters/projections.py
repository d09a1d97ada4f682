"""What makes tokens for cross-attention of an image encoder's answer; parameter names are diffusers'.

Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", section
3.2. Plain adapters read the projected embedding of the whole picture; plus and full ones the states before
the encoder's last layer, one for each patch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.attention import attend, merge_heads, split_heads

HEAD = 64  # channels of a head of the resampler: no file says it


class ImageProjection(nn.Module):
    """[B, E] projected embedding -> [B, N, D]: one layer makes N tokens."""

    reads_states = False

    def __init__(self, width: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.width, self.tokens = width, tokens
        self.image_embeds = nn.Linear(width, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.image_embeds(x).unflatten(-1, (self.tokens, -1)))
        return out


class IPAdapterFullImageProjection(nn.Module):
    """[B, P, E] states -> [B, P, D]: a token for each."""

    reads_states = True

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.width = width
        self.ff = FeedForward(width, width, dim, bias=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.ff(x))
        return out


class IPAdapterPlusImageProjection(nn.Module):
    """[B, P, E] states -> [B, N, D]: N learnt queries ask them, layer by layer.

    A Perceiver resampler: Alayrac et al. 2022, "Flamingo", section 3.1.1.
    """

    reads_states = True

    def __init__(
        self, width: int, dim: int, hidden: int, inner: int, wide: int, tokens: int, depth: int
    ) -> None:
        super().__init__()
        self.width = width
        self.latents = nn.Parameter(torch.empty(1, tokens, hidden))
        nn.init.normal_(self.latents, std=hidden**-0.5)
        self.proj_in = nn.Linear(width, hidden)
        self.layers = nn.ModuleList(Resampling(hidden, inner, wide) for _ in range(depth))
        self.proj_out = nn.Linear(hidden, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        out: Tensor = self.norm_out(self.proj_out(latents))
        return out


Projection = ImageProjection | IPAdapterFullImageProjection | IPAdapterPlusImageProjection


class Resampling(nn.Module):
    """Queries [B, N, C] look at states [B, P, C] and at each other, then a feed-forward layer."""

    def __init__(self, dim: int, inner: int, wide: int) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(dim)
        self.ln1 = nn.LayerNorm(dim)
        self.attn = QueryAttention(dim, inner)
        self.ff = nn.Sequential(nn.LayerNorm(dim), FeedForward(dim, wide, dim, bias=False))

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        asking = self.ln1(latents)
        latents = latents + self.attn(asking, torch.cat([self.ln0(x), asking], dim=1))
        out: Tensor = latents + self.ff(latents)
        return out


class QueryAttention(nn.Module):
    """[B, N, C] asks [B, M, C], in heads of 64 channels; no biases."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.heads = max(1, inner // HEAD)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=False)])

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(seen), self.to_v(seen)
        q, k, v = (split_heads(each, self.heads) for each in (q, k, v))
        out: Tensor = self.to_out[0](merge_heads(attend(q, k, v)))
        return out


class FeedForward(nn.Module):
    """[..., dim] -> [..., out]: W gelu(V x)."""

    def __init__(self, dim: int, wide: int, out: int, *, bias: bool) -> None:
        super().__init__()
        # diffusers has a dropout in the middle: its place keeps the names.
        self.net = nn.Sequential(GELU(dim, wide, bias), nn.Identity(), nn.Linear(wide, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.net(x)
        return made


class GELU(nn.Module):
    """[..., dim] -> [..., wide]: gelu(V x)."""

    def __init__(self, dim: int, wide: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, wide, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


# --- in the names of the files that are passed around ------------------------------------------------------

# By what tells the kind: published names -> diffusers'. Both are read, the published ones are written.
_PLAIN = ((r"proj\.", "image_embeds."),)
_FULL = ((r"proj\.0\.", "ff.net.0.proj."), (r"proj\.2\.", "ff.net.2."), (r"proj\.3\.", "norm."))
_PLUS = (
    (r"(layers\.\d+)\.0\.norm1\.", r"\1.ln0."),
    (r"(layers\.\d+)\.0\.norm2\.", r"\1.ln1."),
    (r"(layers\.\d+)\.(?:0|attn)\.to_out\.(?:0\.)?", r"\1.attn.to_out.0."),
    (r"(layers\.\d+)\.0\.to_", r"\1.attn.to_"),
    (r"(layers\.\d+)\.1\.0\.", r"\1.ff.0."),
    (r"(layers\.\d+)\.1\.1\.", r"\1.ff.1.net.0.proj."),
    (r"(layers\.\d+)\.1\.3\.", r"\1.ff.1.net.2."),
)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projection's tensors in diffusers' names; one that holds keys and values becomes both."""
    table = _PLUS if "latents" in tensors else _FULL if "proj.3.weight" in tensors else _PLAIN
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, instead in table:
            name, changed = re.subn(rf"^{pattern}", instead, name)
            if changed:
                break
        if ".to_kv." in name:
            both = zip(("to_k", "to_v"), tensor.chunk(2), strict=True)
            found |= {name.replace("to_kv", each): half for each, half in both}
        else:
            found[name] = tensor
    return found


def as_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `renamed` for a plain projection, which is what training makes."""
    return {name.replace("image_embeds.", "proj."): tensor for name, tensor in tensors.items()}


def projection_for(tensors: Mapping[str, Tensor], dim: int) -> Projection | None:
    """A projection to tokens of `dim` channels whose shape is that of tensors in diffusers' names.

    None for what is none that is known.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        if "image_embeds.weight" in sizes:
            rows, width = sizes["image_embeds.weight"]
            return ImageProjection(width, dim, max(1, rows // dim))
        if "ff.net.0.proj.weight" in sizes and "norm.weight" in sizes:
            return IPAdapterFullImageProjection(sizes["ff.net.0.proj.weight"][1], dim)
        if "latents" in sizes:
            _, tokens, hidden = sizes["latents"]
            depth = len({name.split(".")[1] for name in sizes if name.startswith("layers.")})
            inner, _ = sizes["layers.0.attn.to_q.weight"]
            wide, _ = sizes["layers.0.ff.1.net.0.proj.weight"]
            width = sizes["proj_in.weight"][1]
            return IPAdapterPlusImageProjection(width, dim, hidden, inner, wide, tokens, depth)
    except (KeyError, IndexError, ValueError):  # one that is missing, or of another number of axes
        return None
    return None
