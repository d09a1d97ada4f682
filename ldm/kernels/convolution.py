"""torch's convolution, made faster on a CPU: by fewer products, and the gradient of a bf16 weight."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ldm.kernels import native, packed
from ldm.kernels.units import cpu_has

# Pixels of a picture, and channels in times out, from which on Winograd's convolution is faster than torch's.
WINOGRAD_PIXELS, WINOGRAD_CHANNELS = 4 * 4, 64 * 64
# With more channels in times out a weight is packed where it is used, and not kept: that takes no longer.
UNPACKED_CHANNELS = 256 * 256
# In bf16 it takes so many: ours are multiplied in fp32, torch's in bf16, which goes twice as fast.
WINOGRAD_PIXELS_BF16 = 8 * 8
# Pixels of a picture up to which a 1 x 1 convolution is no slower as a product of matrices, and quicker where
# pixels are few.
PRODUCT_PIXELS = 32 * 32
# Pixels of a picture up to which a strided convolution is a product of patches: torch's kernel adds up in
# another order for one picture than for several.
STRIDED_PIXELS = 8 * 8
# Output pixels of a batch up to which one matrix product is faster than torch's kernel, a loop on one core.
FEW_PIXELS = 512


def imitates(x: Tensor) -> bool:
    """Whether `x` has 16 bits, on a processor that has no units for them: fp32 is ten times faster there."""
    return x.device.type == "cpu" and is_imitated(x.dtype)


@cache
def is_imitated(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype have 16 bits, on such a processor."""
    if dtype.itemsize != 2:
        return False
    # torch's own function, and so not promised: a version may lack it.
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return has is not None and not has()


class Conv2d(nn.Conv2d):
    """[B, C_in, H, W] -> [B, C_out, H', W']: torch's, but on a CPU by kernels of our own.

    The way is chosen by the size of a picture, never by how many there are. `packs`: whether a copy of the
    weight may be kept for a kernel.
    """

    packs = True

    def forward(self, x: Tensor) -> Tensor:
        learned = self._learned(x) if torch.is_grad_enabled() else None
        return super().forward(x) if learned is None else learned

    def _learned(self, x: Tensor) -> Tensor | None:
        """With gradients of our own; None where torch's are as fast."""
        if x.device.type != "cpu" or not self._is_plain():
            return None
        weight, bias, stride, padding = self.weight, self.bias, self.stride, self.padding
        out: Tensor | None = None
        dtype = self._dtype(x)
        if weight.requires_grad and dtype == torch.bfloat16:
            out = _Convolution.apply(x, weight, bias, stride, padding)  # type: ignore[no-untyped-call]
        elif has_winograd(x, weight, stride, padding) and _learns(x, weight, dtype):  # type: ignore[arg-type]
            x, weight = x.to(dtype), weight.to(dtype)
            out = _Winograd.apply(x, weight, bias, padding[0])  # type: ignore[no-untyped-call]
        return out

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_plain() and x.dtype is weight.dtype:
            out = drawn(x, weight, bias, self.stride, self.padding, self.packs)  # type: ignore[arg-type]
            if out is not None:
                return out
        own: Tensor = super()._conv_forward(x, weight, bias)
        return own

    def _dtype(self, x: Tensor) -> torch.dtype:
        """What torch would compute in."""
        if torch.is_autocast_enabled("cpu"):
            return torch.get_autocast_dtype("cpu")
        return torch.promote_types(x.dtype, self.weight.dtype)

    def _is_plain(self) -> bool:
        zeros = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        return zeros and self.groups == 1 and self.dilation == (1, 1)


class _Convolution(torch.autograd.Function):
    """torch's convolution in bf16 of inputs in any dtype; autograd casts their gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        x = x.bfloat16()
        # The weight is cast twice, as a copy kept for the backward pass would take half its memory.
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding
        return F.conv2d(x, weight.bfloat16(), None if bias is None else bias.bfloat16(), stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        few = grad.shape[0] * grad.shape[2] * grad.shape[3] <= FEW_PIXELS
        wanted = (wants_x, wants_weight and not few, False)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.bfloat16(), None, *ctx.how, (1, 1), False, (0, 0), 1, wanted
        )
        if wants_weight and few:
            dw = weight_gradient(x, grad, weight.shape[2:], *ctx.how)
        # torch's kernel makes the weight's gradient again where it is asked for the bias's.
        db = grad.sum((0, 2, 3)) if wants_bias else None
        return dx, dw, db, None, None


def _learns(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can give the gradients that are wanted: in bf16 not those of a weight."""
    if dtype == torch.bfloat16:
        frozen = not weight.requires_grad and x.requires_grad
        return frozen and native.reachable(x, weight) and not _has_quicker_bf16(x, dtype)
    return native.learns(x, weight)


class _Winograd(torch.autograd.Function):
    """A 3 x 3 convolution by a quarter of the products, and its gradients: in bf16 not that of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _as_torchs(native.convolve_unpacked(x, weight, bias, padding), x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        # Each pixel of x was seen by nine of the output, through the weight turned by 180 degrees.
        if wants_x:
            gone_back = native.convolve_unpacked(grad, weight, None, 2 - ctx.padding, turned=True)
            dx = _as_torchs(gone_back, x, weight)
        if wants_weight:
            dw = native.weight_gradient(x, grad, ctx.padding)
        return dx, dw, grad.sum((0, 2, 3)) if wants_bias else None, None


def weight_gradient(
    x: Tensor, grad: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Gradient of a convolution's weight by one matrix product, in channels_last.

    dW[o, c, i, j] = sum over b, h, w of dY[b, o, h, w] X[b, c, s h + i - p, s w + j - p]. A row of the
    product's second matrix is the patch of the input that one output pixel has seen.

    Args:
        x: the convolution's input [B, C, H, W].
        grad: gradient of its output [B, O, H', W'].
        stride, padding: down and right.

    Returns:
        [O, C, *kernel] in the dtype of `x`.
    """
    patches = seen_patches(x, grad.shape[2:], kernel, stride, padding)
    product = grad.permute(0, 2, 3, 1).flatten(0, 2).t() @ patches.flatten(0, 2)
    return product.view(len(product), *kernel, -1).permute(0, 3, 1, 2)


def drawn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    packs: bool = True,
) -> Tensor | None:
    """A convolution in fp32 or bf16 on a CPU, without gradients, where a kernel beats torch's; else None.

    Args:
        x: [B, C, H, W], padded by zeros.
        weight: [O, C, k, k] in any dtype.
        bias: [O].
        packs: a copy of the weight may be kept.
    """
    pixels, channels = x.shape[2] * x.shape[3], weight.shape[0] * weight.shape[1]
    if weight.shape[2:] == (1, 1) and pixels <= PRODUCT_PIXELS:
        return as_product(x, weight, bias) if stride == (1, 1) and padding == (0, 0) else None
    # In bf16 torch's kernel turns a weight at each call: that takes longer than a small map's products.
    small = pixels <= STRIDED_PIXELS and (stride != (1, 1) or _has_quicker_bf16(x, x.dtype))
    if small and weight.shape[2:] != (1, 1):
        product = as_product_of_patches(x, weight, bias, stride, padding)
        return None if product is None else _as_torchs(product, x, weight)
    if not has_winograd(x, weight, stride, padding):
        return None
    if not native.fits(x, weight, dtypes=native.DTYPES) or _has_quicker_bf16(x, x.dtype):
        return None
    keeps = packs and channels <= UNPACKED_CHANNELS
    if keeps and (ready := packed.winograd(weight)) is not None:
        out = native.convolve(x, ready, bias, len(weight), padding[0])
    else:
        out = native.convolve_unpacked(x, weight, bias, padding[0])
    return _as_torchs(out, x, weight)


def _has_quicker_bf16(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's own 3 x 3 convolution of x in a dtype is quicker: in bf16, by units for it."""
    if dtype != torch.bfloat16 or is_imitated(dtype):
        return False
    return x.shape[2] * x.shape[3] < WINOGRAD_PIXELS_BF16 or cpu_has("amx_tile")


def _is_natural(x: Tensor) -> bool:
    """Whether products of such numbers are quick: in bf16 where a processor has units for it."""
    return x.dtype in native.DTYPES and not is_imitated(x.dtype)


def has_winograd(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether a convolution of these shapes is faster by Winograd's way."""
    pixels, channels = x.shape[-2] * x.shape[-1], weight.shape[0] * weight.shape[1]
    unstrided = weight.shape[2:] == (3, 3) and stride == (1, 1) and padding in ((0, 0), (1, 1))
    return unstrided and x.dim() == 4 and pixels >= WINOGRAD_PIXELS and channels >= WINOGRAD_CHANNELS


def _as_torchs(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """What is drawn in channels_last, laid out as torch's convolution lays it out."""
    return out if is_channels_last(x) or is_channels_last(weight) else out.contiguous()


def as_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A 1 x 1 convolution on a CPU, without gradients, of x in channels_last; else None."""
    if not _is_natural(x) or weight.dtype is not x.dtype or not native.plain(x, weight, dtypes=native.DTYPES):
        return None
    if not is_channels_last(x):
        return None
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def as_product_of_patches(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor | None:
    """Any convolution on a CPU, in channels_last, with its gradients; else None."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or x.device.type != "cpu":
        return None
    if not _is_natural(x) or weight.dtype is not x.dtype:
        return None
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    size = torch.Size((side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides)
    patches = seen_patches(x, size, weight.shape[2:], stride, padding)
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def seen_patches(
    x: Tensor, size: torch.Size, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """What each pixel of a convolution's output [H', W'] has seen of x [B, C, H, W]: [B, H', W', k k C]."""
    (height, width), (down, right), (above, left) = size, stride, padding
    pixels = F.pad(x, (left, left, above, above)).permute(0, 2, 3, 1)
    seen = [
        pixels[:, i : i + down * height : down, j : j + right * width : right][:, :height, :width]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.cat(seen, dim=-1)
