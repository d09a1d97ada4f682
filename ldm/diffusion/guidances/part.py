"""What a guidance by name is made of: an answer that parts change in turn, and parts with their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance, Predict, ToX0


@dataclass(frozen=True, eq=False)
class Answer:
    """What the network said at one state, and what the parts so far made of it.

    outputs: the network's raw output by branch, [B, C, H, W] each. guided: the raw output that is made of
    them; "cond"'s at first. anchor: the raw output along whose noise solvers step; None: guided. scale: the
    request's guidance scale, 1 for none. step: how many of the drawing's noise levels lie above.
    """

    x: Tensor  # [B, C, H, W], in sigma space
    sigma: Tensor
    outputs: Mapping[str, Tensor]
    guided: Tensor
    scale: float
    step: int
    predict: Predict
    to_x0: ToX0
    anchor: Tensor | None = None

    @property
    def cond(self) -> Tensor:
        return self.outputs["cond"]

    @property
    def uncond(self) -> Tensor:
        return self.outputs["uncond"]

    def x0(self, output: Tensor) -> Tensor:
        """The clean latents that a raw output speaks of."""
        return self.to_x0(output, self.x, self.sigma)

    def gain(self) -> Tensor:
        """By how much x0 moves where the output does, a scalar: x0 is linear in the output (`Prediction`)."""
        like = self.x.new_zeros(())
        return self.to_x0(like + 1, like, self.sigma)

    def led(self, guided: Tensor, anchor: Tensor | None = None) -> Self:
        return replace(self, guided=guided, anchor=self.anchor if anchor is None else anchor)

    def moved(self, x0: Tensor) -> Self:
        """With the guided output that speaks of these clean latents."""
        return self.led(self.cond + (x0 - self.x0(self.cond)) / self.gain())

    def by(self, guidance: Guidance) -> Self:
        """As a guidance combines the outputs that are there."""
        outputs = self.outputs
        combine = guidance(lambda x, sigma, names: {name: outputs[name] for name in names}, _output)
        combined = combine(self.x, self.sigma)
        return self.led(combined.x0, None if combined.anchor is combined.x0 else combined.anchor)

    def told(self, **outputs: Tensor) -> Self:
        """With other outputs of some branches."""
        return replace(self, outputs={**self.outputs, **outputs})


def _output(output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """In the place of a ToX0, where outputs are wanted and not what they speak of."""
    return output


Change = Callable[[Answer], Answer]


class Rank(IntEnum):
    """When a part's turn comes. Of those that COMBINE a chain has one at most; without, it is plain CFG."""

    PREPARES = 1
    COMBINES = 2
    ADDS = 3
    FINISHES = 4
    LIMITS = 5


@dataclass(frozen=True)
class Part:
    """A guidance with its options: those of a dataclass, each made by `option`, that are given by name.

    label and source are for people: what it is called, and where its equation stands. instead: branches that
    are asked for in the place of others. compute: rows of the network in a step, in words.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str]
    rank: ClassVar[Rank]
    aliases: ClassVar[tuple[str, ...]] = ()
    instead: ClassVar[Mapping[str, str]] = {}

    @property
    def reads(self) -> tuple[str, ...]:
        """The branches that it must be given, beside "cond"."""
        return ("uncond",) if self.rank in (Rank.PREPARES, Rank.COMBINES) else ()

    @property
    def still(self) -> int:
        """In so many first steps nothing moves, and nothing is asked."""
        return 0

    def begin(self) -> Change:
        """What it does in one drawing, which may remember its steps."""
        return self.change

    def change(self, a: Answer) -> Answer:
        return a


@dataclass(frozen=True)
class Option:
    """What an option of a part may be: a number from `low` to `high`, or one of `choices`, or any text."""

    kind: type
    low: float
    high: float
    choices: tuple[str, ...]

    @property
    def allowed(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is str:
            return "a text"
        return f"a {'whole ' if self.kind is int else ''}number from {self.low:g} to {self.high:g}"


def option(
    default: Any,
    low: float = 0.0,
    high: float = 100.0,
    kind: type | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a `Part`; None as the default is what the part makes of the drawing."""
    kind = type(default) if kind is None else kind
    return field(default=default, metadata={"option": Option(kind, low, high, choices)})


def each(tensor: Tensor) -> list[int]:
    """All dimensions but the first: sums over them are of one picture each."""
    return list(range(1, tensor.ndim))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each picture's vectors: [B, 1, 1, 1]."""
    return (a * b).sum(each(a), keepdim=True)


def along(a: Tensor, b: Tensor) -> Tensor:
    """The part of `a` that is parallel to `b`, picture by picture; 0 where b is."""
    return dot(a, b) / dot(b, b).clamp_min(torch.finfo(b.dtype).tiny) * b
