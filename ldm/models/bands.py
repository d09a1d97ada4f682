"""Feature maps made band by band, layer by layer, exactly: what the VAEs do where memory is short.

A layer gives any rows of its output, and asks the one before it for the rows that it needs: one more at each
side for a 3 x 3 convolution. Everybody asks from top to bottom, and a convolution keeps the rows that it gave
last, so that none is made twice on one walk down the map. A GroupNorm first walks down the whole map before
it, for mean and variance; what was not `stored` meanwhile is made again when its own rows are asked for.

Only for pictures, not for gradients: a layer remembers what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.kernels.convolution import drawn, imitates

BAND_BYTES = 8 << 20  # of one layer's rows in fp32
# Bands of a stored map that are one block of memory: large ones go back to the system when they are freed,
# while small ones among short-lived tensors leave holes.
BANDS_EACH = 16


class Layer:
    """What can give rows of a feature map [batch, channels, height, width]."""

    batch: int
    channels: int
    height: int
    width: int
    row: int  # numbers of a row, of what is widest between the stored maps and here

    @property
    def sources(self) -> tuple[Stored, ...]:
        """The stored maps that it is made of."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to before `stop`: [B, C, stop - start, W]."""
        raise NotImplementedError

    def bands(self) -> Iterable[tuple[int, int]]:
        """(start, stop) of bands, from top to bottom."""
        step = max(4, BAND_BYTES // (4 * self.row))
        return pairwise([*range(0, self.height, step), self.height])

    @property
    def numbers(self) -> int:
        """Of the whole map."""
        return self.batch * self.channels * self.height * self.width


class Stored(Layer):
    """A feature map in memory, as blocks one below the other."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self.batch, self.channels, _, self.width = blocks[0].shape
        self.row = self.batch * self.channels * self.width
        self._tops = [0, *accumulate(block.shape[2] for block in blocks)]
        self.height = self._tops[-1]
        self._blocks: list[Tensor | None] = [*blocks]
        self._lowest = self.height  # row that was asked for since the last `release`

    @property
    def sources(self) -> tuple[Stored, ...]:
        return (self,)

    def rows(self, start: int, stop: int) -> Tensor:
        """As of any layer. Raises RuntimeError for rows that were given back."""
        self._lowest = min(self._lowest, start)
        parts = []
        for block, (top, bottom) in zip(self._blocks, pairwise(self._tops), strict=True):
            if top < stop and bottom > start:
                if block is None:
                    raise RuntimeError(f"rows {top} to {bottom} of a map were given back")
                parts.append(block[:, :, max(start - top, 0) : stop - top])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def release(self) -> None:
        """Forget what is above the rows asked for since the last call: later calls ask for lower ones."""
        self._blocks = [
            None if bottom <= self._lowest else block
            for block, bottom in zip(self._blocks, self._tops[1:], strict=True)
        ]
        self._lowest = self.height

    def whole(self) -> Tensor:
        """[B, C, H, W]."""
        return self.rows(0, self.height)


def stored(layer: Layer, release: bool = True) -> Stored:
    """A layer's map, made once; with `release` those that it is made of are given back meanwhile."""
    if isinstance(layer, Stored):
        return layer
    blocks, top = list[Tensor](), 0
    for i, (start, stop) in enumerate(layer.bands()):
        made = layer.rows(start, stop)
        if i % BANDS_EACH == 0:
            top, height = start, min((stop - start) * BANDS_EACH, layer.height - start)
            blocks.append(_empty(made, height))
        blocks[-1][:, :, start - top : stop - top] = made
        for source in layer.sources if release else ():
            source.release()
    return Stored(blocks)


def _empty(like: Tensor, height: int) -> Tensor:
    """[B, C, height, W], laid out as another one."""
    batch, channels, _, width = like.shape
    last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    size = batch, channels, height, width
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


class Pointwise(Layer):
    """A function of the pixels of one or more maps of one size, each by itself."""

    def __init__(self, function: Callable[..., Tensor], *of: Layer) -> None:
        self.function, self.of = function, of
        self.batch, self.channels, self.height, self.width = _shape(of[0])
        self.row = max(each.row for each in of)

    @property
    def sources(self) -> tuple[Stored, ...]:
        return tuple(dict.fromkeys(source for each in self.of for source in each.sources))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.function(*(each.rows(start, stop) for each in self.of))


class Normed(Layer):
    """GroupNorm of the whole map, and a function of each pixel after it."""

    def __init__(self, of: Layer, norm: nn.GroupNorm, then: Callable[[Tensor], Tensor] = F.silu) -> None:
        self.of, self.norm, self.then = of, norm, then
        self.batch, self.channels, self.height, self.width = _shape(of)
        self.row = of.row

    @property
    def sources(self) -> tuple[Stored, ...]:
        return self.of.sources

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """fp32 [B, C, 1, 1] each.

        Means and sums of squares of each channel in each band, put together in float64: Chan et al. 1979,
        "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", equation 2.1.
        """
        counts, means, squares = [], [], []
        for start, stop in self.of.bands():
            x = self.of.rows(start, stop).float()
            mean = x.mean((2, 3), keepdim=True)
            counts.append((stop - start) * self.width)
            means.append(mean.flatten(1).double())
            squares.append((x - mean).square_().sum((2, 3)).double())
        groups, each = self.norm.num_groups, self.channels // self.norm.num_groups
        count = torch.tensor(counts, dtype=torch.float64, device=means[0].device)[:, None, None, None]
        parts = torch.stack(means).reshape(len(counts), self.batch, groups, each)
        inner = torch.stack(squares).reshape(parts.shape)
        total = count.sum() * each
        mean = (parts * count).sum((0, 3), keepdim=True) / total
        variance = (inner + count * (parts - mean) ** 2).sum((0, 3)) / total
        scale = (variance + self.norm.eps).rsqrt().repeat_interleave(each, 1) * self.norm.weight.double()
        shift = self.norm.bias.double() - mean[0, ..., 0].repeat_interleave(each, 1) * scale
        return scale.float()[..., None, None], shift.float()[..., None, None]

    def rows(self, start: int, stop: int) -> Tensor:
        scale, shift = self._scale_and_shift
        x = self.of.rows(start, stop)
        return self.then(torch.addcmul(shift, x.float(), scale).to(x.dtype))


class Convolved(Layer):
    """A convolution, with zeros around the map as `conv` has them, or one more at the right and bottom."""

    def __init__(self, of: Layer, conv: nn.Conv2d, pad_right_bottom: bool = False) -> None:
        self.of, self.conv = of, conv
        (self.kernel, _), (self.stride, _) = conv.kernel_size, conv.stride
        self.before = int(conv.padding[0])  # rows above, columns left
        self.after = self.before + pad_right_bottom  # rows below, columns right
        self.batch, self.channels = of.batch, conv.out_channels
        self.height, self.width = (
            (side + self.before + self.after - self.kernel) // self.stride + 1
            for side in (of.height, of.width)
        )
        self.row = max(self.batch * self.channels * self.width, self.stride * of.row)
        self._top, self._made = 0, torch.empty(0, 0, 0)

    @property
    def sources(self) -> tuple[Stored, ...]:
        return self.of.sources

    def rows(self, start: int, stop: int) -> Tensor:
        bottom = self._top + self._made.shape[2]
        if not self._top <= start < bottom:  # a new walk
            self._top, self._made = start, self._convolve(start, stop)
        elif stop > bottom:
            kept = self._made[:, :, start - self._top :]
            self._top, self._made = start, torch.cat([kept, self._convolve(bottom, stop)], 2)
        return self._made[:, :, start - self._top : stop - self._top]

    def _convolve(self, start: int, stop: int) -> Tensor:
        x = self._padded(start * self.stride, (stop - 1) * self.stride + self.kernel)
        weight, bias, stride = self.conv.weight, self.conv.bias, (self.stride, self.stride)
        if not imitates(x):
            same = x.dtype is weight.dtype
            out = drawn(x, weight, bias, stride, (0, 0), packs=False) if same else None
            return F.conv2d(x, weight, bias, stride) if out is None else out
        wide, bias = x.float(), None if bias is None else bias.float()
        out = drawn(wide, weight, bias, stride, (0, 0), packs=False)
        return (F.conv2d(wide, weight.float(), bias, stride) if out is None else out).to(x.dtype)

    def _padded(self, start: int, stop: int) -> Tensor:
        """Rows of the map with what lies around it."""
        start, stop = start - self.before, stop - self.before
        above, below = max(-start, 0), max(stop - self.of.height, 0)
        x = self.of.rows(start + above, stop - below)
        return F.pad(x, (self.before, self.after, above, below))


class Enlarged(Layer):
    """Each pixel as a square of `factor` x `factor`."""

    def __init__(self, of: Layer, factor: int = 2) -> None:
        self.of, self.factor = of, factor
        self.batch, self.channels = of.batch, of.channels
        self.height, self.width = factor * of.height, factor * of.width
        self.row = self.batch * self.channels * self.width

    @property
    def sources(self) -> tuple[Stored, ...]:
        return self.of.sources

    def rows(self, start: int, stop: int) -> Tensor:
        top = start // self.factor
        x = self.of.rows(top, -(-stop // self.factor))
        x = F.interpolate(x, scale_factor=self.factor, mode="nearest")
        return x[:, :, start - top * self.factor : stop - top * self.factor]


def _shape(layer: Layer) -> tuple[int, int, int, int]:
    return layer.batch, layer.channels, layer.height, layer.width
