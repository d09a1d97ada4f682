"""What an adapter adds to the weight and the bias of one layer, in closed form, fp32.

    LoRA    dW = B A                            Hu et al. 2021, https://arxiv.org/abs/2106.09685
    LoCon   dW = B (M) A, convolutions          LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859
    LoHa    dW = (B1 A1) * (B2 A2)              Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098
    LoKr    dW = C (x) (B A)                    Edalati et al. 2022, https://arxiv.org/abs/2212.10650
    DoRA    W' = m (W + dW) / ||W + dW||        Liu et al. 2024, https://arxiv.org/abs/2402.09353

each dW times alpha / rank. A difference is dW itself, of norms too (LyCORIS: full, norm; ComfyUI), and db can
stand beside each kind; peft's bias of B is scaled as B is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import UserError

# Which tensors must be there, and which may be. The first row that is begun decides the kind.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "LoRA": (("down", "up"), ("mid", "up_bias")),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")),
    "LoKr": ((), ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "difference": ((), ("diff", "diff_b")),
}
MAGNITUDES = ("magnitude", "dora_scale")
BIASES = ("up_bias", "diff_b")


@dataclass(frozen=True, eq=False)
class Delta:
    """The tensors of one layer in an adapter file, by role, and alpha / rank."""

    tensors: Mapping[str, Tensor]
    kind: str
    scale: float

    @property
    def is_low_rank(self) -> bool:
        """Whether it can be computed beside the layer, without a new weight."""
        return self.kind == "LoRA" and self.magnitude is None

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's m, if there is one."""
        return next((self.tensors[name] for name in MAGNITUDES if name in self.tensors), None)

    @property
    def has_weight(self) -> bool:
        """Whether it changes the weight, and not only the bias."""
        return self.kind != "difference" or "diff" in self.tensors

    @property
    def has_bias(self) -> bool:
        """Whether it changes the bias."""
        return any(role in self.tensors for role in BIASES)

    def check(self, layer: nn.Module) -> None:
        """Raises UserError if it does not fit a layer. Nothing is computed but shapes."""
        if self.has_weight:
            if self.kind != "difference" and not isinstance(layer, nn.Linear | nn.Conv2d):
                raise UserError(
                    f"a {self.kind} changes linear layers and convolutions, not {type(layer).__name__}"
                )
            self.change(torch.empty_like(layer.get_parameter("weight"), device="meta").float())
        if self.has_bias:
            bias = dict(layer.named_parameters(recurse=False)).get("bias")
            if bias is None:
                raise UserError("it changes a bias, and this layer has none")
            self.change_bias(torch.empty_like(bias, device="meta").float())

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """LoRA's (down [r, in, ...], scaled up [out, r]) for a layer's `weight` [out, in, ...], fp32.

        The middle of a convolution in three parts (LoCon's `lora_mid`) becomes part of `down`.
        """
        down, up = self._low_rank(weight)
        return down.reshape(-1, *weight.shape[1:]), self.scale * up

    def change(self, weight: Tensor) -> Tensor:
        """What to add to `weight` [out, in, ...], or [C] (fp32). Raises UserError if it does not fit."""
        made = self._product(weight)
        magnitude = self.magnitude
        if magnitude is None:
            return made
        adapted = weight + made
        by_input = "dora_scale" in self.tensors and _is_by_input(magnitude, weight)
        keep = 1 if by_input else 0
        axes = [axis for axis in range(weight.ndim) if axis != keep]
        if magnitude.numel() != weight.shape[keep]:
            raise UserError(
                f"its magnitudes {list(magnitude.shape)} do not fit a layer of {list(weight.shape)}"
            )
        shape = [-1 if axis == keep else 1 for axis in range(weight.ndim)]
        norm = torch.linalg.vector_norm(adapted, dim=axes, keepdim=True)
        whole: Tensor = magnitude.to(weight).reshape(shape) / norm * adapted
        return whole - weight

    def change_bias(self, bias: Tensor) -> Tensor:
        """What to add to `bias` [out] (fp32). Raises UserError if it does not fit."""
        total = torch.zeros_like(bias)
        for role, scale in zip(BIASES, (self.scale, 1.0), strict=True):
            if role in self.tensors:
                if self.tensors[role].numel() != bias.numel():
                    given = list(self.tensors[role].shape)
                    raise UserError(f"it changes a bias of {given}, this one is {list(bias.shape)}")
                total += scale * self._get(role, bias).reshape(bias.shape)
        return total

    def _product(self, weight: Tensor) -> Tensor:
        if self.kind == "difference":
            made = self._get("diff", weight)
            _check_shape(tuple(made[:, None].flatten(1).shape), weight)
            return made.reshape(weight.shape)
        try:
            made = {"LoRA": self._lora, "LoHa": self._loha, "LoKr": self._lokr}[self.kind](weight)
        except RuntimeError:
            shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in self.tensors.items())
            raise UserError(f"{shapes} do not go together: different ranks?") from None
        _check_shape(tuple(made.flatten(1).shape), weight)
        return self.scale * made.reshape(weight.shape)

    def _lora(self, weight: Tensor) -> Tensor:
        down, up = self._low_rank(weight)
        return up @ down

    def _low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(down [r, ...], up [out, r])."""
        down, up = self._get("down", weight), self._get("up", weight).flatten(1)
        if "mid" in self.tensors:
            down = torch.einsum("mnhw,nj->mjhw", self._get("mid", weight), down.flatten(1))
        if up.shape[1] != down.shape[0]:
            raise UserError(f"its up {list(up.shape)} and down {list(down.shape)} are of different ranks")
        down = down.flatten(1)
        _check_shape((up.shape[0], down.shape[1]), weight)
        return down, up

    def _loha(self, weight: Tensor) -> Tensor:
        one, two = (self._pair(f"hada_w{k}", f"hada_t{k}", weight) for k in (1, 2))
        return one * two

    def _lokr(self, weight: Tensor) -> Tensor:
        w1, w2 = (self._pair(f"lokr_w{k}", f"lokr_t{k}", weight) for k in (1, 2))
        return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())

    def _pair(self, name: str, core: str, weight: Tensor) -> Tensor:
        """A matrix that is stored whole, as a product a b, or with a core t (Tucker): t x1 a x2 b."""
        if name in self.tensors:
            return self._get(name, weight)
        a, b = self._get(f"{name}_a", weight), self._get(f"{name}_b", weight)
        if core in self.tensors:
            return torch.einsum("ij...,ip,jr->pr...", self._get(core, weight), a, b)
        return a @ b

    def _get(self, role: str, weight: Tensor) -> Tensor:
        return self.tensors[role].to(weight.device, torch.float32)


def make_delta(tensors: Mapping[str, Tensor], scale: float | None) -> Delta:
    """The `Delta` of a layer's tensors; `scale` None: alpha / rank by the tensors themselves.

    Raises UserError if some are missing or too many.
    """
    kind = next(
        (name for name, roles in KINDS.items() if any(role in tensors for role in sum(roles, ()))), ""
    )
    if not kind:
        raise UserError(f"has {', '.join(tensors)} but no LoRA, LoHa or LoKr tensors")
    for role, tensor in tensors.items():
        least = 0 if role in MAGNITUDES else 1 if role in ("diff", *BIASES) else 2  # dimensions
        if tensor.numel() != 1 if role == "alpha" else tensor.ndim < least:
            raise UserError(f"its {role} has the shape {list(tensor.shape)}")
    must, may = KINDS[kind]
    if kind == "LoKr":
        must = tuple(f"lokr_w{k}{end}" for k in (1, 2) for end in _endings(tensors, k))
    lost = [role for role in must if role not in tensors]
    common = ("alpha", "diff_b", *MAGNITUDES * (kind != "difference"))
    strange = [role for role in tensors if role not in (*must, *may, *common)]
    if lost or strange:
        fault = f"has no {', '.join(lost)}" if lost else f"has {', '.join(strange)} beside those of a {kind}"
        raise UserError(fault)
    return Delta(tensors, kind, _own_scale(tensors, kind) if scale is None else scale)


def _endings(tensors: Mapping[str, Tensor], k: int) -> tuple[str, ...]:
    return ("",) if f"lokr_w{k}" in tensors else ("_a", "_b")


def _own_scale(tensors: Mapping[str, Tensor], kind: str) -> float:
    """alpha / rank; 1 without alpha, and for a LoKr of two whole matrices, which has no rank."""
    sizes = {"LoRA": ("down",), "LoHa": ("hada_w1_b",), "LoKr": ("lokr_w1_b", "lokr_w2_b")}.get(kind, ())
    rank = next((tensors[name].shape[0] for name in sizes if name in tensors), None)
    if "alpha" not in tensors or not rank:
        return 1.0
    return float(tensors["alpha"].flatten()[0]) / rank


def _check_shape(made: tuple[int, ...], weight: Tensor) -> None:
    if made != (weight.shape[0], weight.shape[1:].numel()):
        raise UserError(f"it changes a layer of {made[1]} -> {made[0]}, this one is {list(weight.shape)}")


def _is_by_input(magnitude: Tensor, weight: Tensor) -> bool:
    """LyCORIS keeps one magnitude per input, [1, in, 1, 1], or per output, [out, 1, 1, 1]."""
    return magnitude.ndim > 1 and magnitude.shape[0] == 1 and weight.shape[0] > 1
