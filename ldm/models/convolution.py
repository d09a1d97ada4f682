"""torch's convolution, made to train faster on a CPU: the gradient of its weight, where pixels are few."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Output pixels of a batch up to which one matrix product is faster than torch's kernel, a loop on one core.
FEW_PIXELS = 512


def imitates(x: Tensor) -> bool:
    """Whether `x` has 16 bits, on a processor that has no units for them: fp32 is ten times faster there."""
    if x.device.type != "cpu" or x.element_size() != 2:
        return False
    # torch's own function, and so not promised: a version may lack it.
    name = "bf16" if x.dtype == torch.bfloat16 else "fp16"
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return has is not None and not has()


class Conv2d(nn.Conv2d):
    """[B, C_in, H, W] -> [B, C_out, H', W']: torch's, but for its gradients in bf16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad and x.device.type == "cpu"
        if trains and self._dtype(x) == torch.bfloat16 and self._is_plain():
            out: Tensor = _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[no-untyped-call]
            return out
        return super().forward(x)

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
    height, width = grad.shape[2:]
    (down, right), (above, left) = stride, padding
    pixels = F.pad(x, (left, left, above, above)).permute(0, 2, 3, 1)
    seen = [
        pixels[:, i : i + down * height : down, j : j + right * width : right][:, :height, :width]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    patches = torch.cat(seen, dim=-1).flatten(0, 2)
    product = grad.permute(0, 2, 3, 1).flatten(0, 2).t() @ patches
    return product.view(len(product), *kernel, -1).permute(0, 3, 1, 2)
