"""Parts in a row as one guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ldm.diffusion.guidance import CFG, CFGPlusPlus, InstructPix2Pix, Predict, ToX0
from ldm.diffusion.guidances.part import Answer, Part, Rank
from ldm.diffusion.guidances.plain import PlainCFG
from ldm.diffusion.solvers import Denoise, Denoised


@dataclass(frozen=True)
class Chain:
    """`parts`, in the order of their ranks, around how branches are combined where none of them says it.

    What reads "uncond" is left out at scale 1, as there is nothing to guide, and the branch is not asked for.

    Args:
        plain: with the request's scale.
        levels: the noise levels of the drawing's steps, for parts that count them.
        within: names of parts that act from one noise level to below another, low and high.
    """

    plain: CFG | CFGPlusPlus | InstructPix2Pix
    parts: tuple[Part, ...]
    levels: tuple[float, ...] = ()
    within: tuple[tuple[str, float, float], ...] = ()

    @property
    def scale(self) -> float:
        return 1.0 if isinstance(self.plain, CFGPlusPlus) else self.plain.scale

    @property
    def is_off(self) -> bool:
        """Whether the text is not guided at all."""
        return isinstance(self.plain, CFG) and self.plain.scale == 1

    @cached_property
    def acting(self) -> tuple[Part, ...]:
        parts = sorted(self.parts, key=lambda part: part.rank)
        parts = [part for part in parts if not isinstance(part, PlainCFG)]
        return tuple(part for part in parts if not (self.is_off and "uncond" in part.reads))

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """All that are asked for in a step, each once."""
        return self._asked(self.acting)

    def _asked(self, parts: Sequence[Part]) -> tuple[str, ...]:
        combines = any(part.rank is Rank.COMBINES for part in parts)
        first = ("uncond", "cond") if combines else self.plain.branches
        names = [*first, *(name for part in parts for name in part.reads)]
        return tuple(dict.fromkeys(self._instead.get(name, name) for name in names))

    @cached_property
    def _instead(self) -> dict[str, str]:
        return {name: other for part in self.acting for name, other in part.instead.items()}

    def __call__(self, predict: Predict, to_x0: ToX0) -> Denoise:
        parts = self.acting
        begun = [(part.name, part.rank, part.begin()) for part in parts]
        if not any(rank is Rank.COMBINES for _, rank, _ in begun):
            begun.append(("", Rank.COMBINES, self._plainly))
        changes = [(name, change) for name, _, change in sorted(begun, key=lambda each: each[1])]
        still = max((part.still for part in parts), default=0)

        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            step = sum(level > float(sigma) for level in self.levels)
            if step < still:
                return Denoised(x / (1 + sigma**2))  # v = 0: the state of unit variance stays as it is
            out = {name for name, low, high in self.within if not low <= float(sigma) < high}
            asked = self._asked([part for part in parts if part.name not in out]) if out else self.branches
            outputs = predict(x, sigma, asked)
            outputs |= {name: outputs[other] for name, other in self._instead.items()}
            a = Answer(x, sigma, outputs, outputs["cond"], self.scale, step, predict, to_x0)
            for name, change in changes:
                a = a if name in out else change(a)
            x0 = a.x0(a.guided)
            return Denoised(x0) if a.anchor is None else Denoised(x0, a.x0(a.anchor))

        return denoise

    def _plainly(self, a: Answer) -> Answer:
        return a.by(self.plain)
