"""Blocks that networks share: resnets, resampling, the embedding of the timestep, feed-forward."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.kernels import native
from ldm.kernels.convolution import Conv2d, is_channels_last

LARGE_MAP = (
    256 * 256
)  # pixels from which on torch's GroupNorm in channels_last is off by more than 1e-5 on a CPU
# What is widest in a feed-forward layer is made so much at a time on a CPU, and then stays in the caches.
WIDE_BYTES = 16 << 20
FEW_ROWS = 8  # of a product: with as many or more MKL adds each up in one order


def timestep_features(t: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoidal features of the timestep (Ho et al. 2020; Vaswani et al. 2017, section 3.5).

    [sin(t w_k), cos(t w_k)] with w_k = 10000^(-k / (dim/2 - freq_shift)), k = 0 ... dim/2 - 1; cosines first
    with `flip_sin_to_cos`. An odd `dim` ends with a zero.

    Args:
        t: [...], in steps of the training schedule, fractions allowed.

    Returns:
        [..., dim] in fp32.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[..., None] * torch.exp(-math.log(10000) * k / (half - freq_shift))
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(pair, dim=-1), (0, dim % 2))


def by_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` of vectors x [B, ...]: each row as it comes out alone, whatever stands beside it.

    On a CPU a product adds up in another order where its rows are fewer than `FEW_ROWS`, and for one row even
    by where its numbers lie in memory: so products have that many, of which some may be zeros. Else a picture
    would differ in a batch in its last bits from itself drawn alone.
    """
    if x.device.type != "cpu" or layer.training or len(x) == FEW_ROWS:
        out: Tensor = layer(x)
        return out
    if len(x) > FEW_ROWS:
        return torch.cat([by_rows(layer, part) for part in torch.split(x, FEW_ROWS)])
    beside = (0, 0) * (x.dim() - 1)
    padded: Tensor = layer(F.pad(x, (*beside, 0, FEW_ROWS - len(x))))
    return padded[: len(x)]


class TimeEmbedding(nn.Module):
    """[B, dim] features -> [B, time_dim].

    Args:
        cond_dim: width of a second input [B, cond_dim] that is added to the features (the guidance of LCM).
    """

    def __init__(self, dim: int, time_dim: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, dim, bias=False)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, features: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and cond is not None:
            features = features + by_rows(self.cond_proj, cond)
        return by_rows(self.linear_2, F.silu(by_rows(self.linear_1, features)))


class GroupNorm(nn.GroupNorm):
    """[B, C, ...] -> the same: torch's GroupNorm, exact in channels_last too; SiLU after it where asked."""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        if x.dim() == 4 and is_channels_last(x) and native.fits(x, self.weight, dtypes=native.DTYPES):
            return native.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)
        out = self._by_torch(x)
        return F.silu(out) if silu else out

    def _by_torch(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if x.device.type == "cpu" and not x.is_contiguous():
            dtype = x.dtype
            if x.element_size() == 2:  # whose kernel is ten times slower than the one for fp32
                x, weight, bias = x.float(), weight.float(), bias.float()
            if x.dim() == 4 and x.shape[2] * x.shape[3] > LARGE_MAP:  # whose sums are exact only so
                whole = F.group_norm(x.contiguous(), self.num_groups, weight, bias, self.eps)
                return whole.to(dtype, memory_format=torch.channels_last)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps).to(dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResnetBlock(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, H, W]: two 3 x 3 convolutions around the time embedding, and a skip.

    Args:
        time_dim: width of the time embedding; None in the VAE, which has no time.
        scale: the sum with the skip is divided by it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`time`: silu(time embedding) [B or 1, time_dim]: taken once for all resnets by the caller."""
        h = self.conv1(self.norm1(x, silu=True))
        if self.time_emb_proj is not None and time is not None:
            h = h + by_rows(self.time_emb_proj, time)[:, :, None, None]
        h = self.conv2(self.norm2(h, silu=True))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out: Tensor = x + h
        return out if self.scale == 1 else out / self.scale


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H / 2, W / 2] by a strided convolution.

    Args:
        padding: 1 pads all sides; 0 pads right and bottom only, as the VAE's encoder was trained.
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad_right_bottom = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_right_bottom else x)
        return out


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2 H, 2 W], or `size` where given: nearest pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        if 4 * x.numel() >= 2**31:
            # The CUDA kernel for channels_last counts in 32 bits: https://github.com/pytorch/pytorch/issues/141831
            x = x.contiguous()
        enlarged = F.interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest")
        out: Tensor = self.conv(enlarged)
        return out


class GEGLU(nn.Module):
    """[..., dim] -> [..., inner]: a gelu(b) with [a, b] = W x + c  (Shazeer 2020, equation 6)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.proj(x)
        if native.fits(both, dtypes=native.DTYPES):
            return native.geglu(both)
        value, gate = both.chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    """[B, N, dim] -> [B, N, dim] through four times the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # diffusers has a dropout in the middle: its place keeps the names.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        rows = max(1, WIDE_BYTES // (8 * x.shape[-1] * x.element_size()))
        if torch.is_grad_enabled() or x.device.type != "cpu" or len(tokens) <= rows:
            whole: Tensor = self.net(x)
            return whole
        out = torch.empty_like(tokens)
        for some, to in zip(torch.split(tokens, rows), torch.split(out, rows), strict=True):
            to.copy_(self.net(some))
        return out.view(x.shape)
