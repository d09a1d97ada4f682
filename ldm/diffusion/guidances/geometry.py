"""Guidances that look at angles and lengths of what the branches say, each picture's its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.guidance import CFG
from ldm.diffusion.guidances.part import Answer, Change, Part, Rank, along, dot, each, option


@dataclass(frozen=True)
class ZeroStar(Part):
    """CFG-Zero*: "uncond" is multiplied by what brings it nearest to "cond", and the first steps do nothing.

    ``s = <cond, uncond> / |uncond|^2``, ``uncond <- s uncond``. In the first `zero_init` steps the velocity v
    is 0, whatever the network predicts, and it is not asked.
    """

    name = "cfg_zero_star"
    label = "CFG-Zero*"
    source = "Fan et al. 2025 (arXiv 2503.18886), section 4"
    rank = Rank.PREPARES
    aliases = ("cfgzero", "zerostar", "classifierfreezerostarguidance")
    zero_init: int = option(1, 0, 100)

    @property
    def still(self) -> int:
        return self.zero_init

    def change(self, a: Answer) -> Answer:
        return a.told(uncond=along(a.cond, a.uncond))


@dataclass(frozen=True)
class Tangential(Part):
    """TCFG: of "uncond" only what lies along the direction that it and "cond" have most in common.

    ``uncond <- <uncond, v> v``, v the first right singular vector of the two as rows of a matrix.
    """

    name = "tcfg"
    label = "TCFG"
    source = "Kwon et al. 2025 (arXiv 2503.18137)"
    rank = Rank.PREPARES
    aliases = ("tangential", "tangentialcfg", "tangentialclassifierfreeguidance")

    def change(self, a: Answer) -> Answer:
        p, q, r = dot(a.cond, a.cond), dot(a.cond, a.uncond), dot(a.uncond, a.uncond)
        # The larger eigenvalue of [[p, q], [q, r]] has the eigenvector (cos, sin) of this angle.
        angle = torch.atan2(2 * q, p - r) / 2
        return a.told(uncond=along(a.uncond, angle.cos() * a.cond + angle.sin() * a.uncond))


@dataclass(frozen=True)
class Projected(Part):
    """APG: the difference of the branches, of which what is parallel to "cond" counts `eta` times.

    ``d <- cond - uncond + momentum d_before``, ``d <- d min(1, r / |d|)`` (no limit where r is 0), and
    ``cond + (scale - 1) (d_orthogonal + eta d_parallel)``, on x0 as in the paper, or on the network's
    "output" as in diffusers, whose ``use_original_formulation`` this is.
    """

    name = "apg"
    label = "APG"
    source = "Sadat et al. 2024 (arXiv 2410.02416), algorithm 1"
    rank = Rank.COMBINES
    aliases = ("adaptiveprojected", "adaptiveprojectedguidance")
    eta: float = option(0.0, -10.0, 10.0)
    r: float = option(0.0, 0.0, 1e6)
    momentum: float = option(0.0, -1.0, 1.0)
    space: str = option("x0", choices=("x0", "output"))

    def begin(self) -> Change:
        before: list[Tensor] = []

        def change(a: Answer) -> Answer:
            gain: Tensor | float = a.gain() if self.space == "x0" else 1.0
            cond = a.x0(a.cond) if self.space == "x0" else a.cond
            difference = gain * (a.cond - a.uncond)
            if self.momentum and before:
                difference = difference + self.momentum * before.pop()
            before[:] = [difference] if self.momentum else []
            if self.r:
                length = torch.linalg.vector_norm(difference, dim=each(difference), keepdim=True)
                difference = difference * (self.r / length).clamp_max(1)
            update = difference + (self.eta - 1) * along(difference, cond)
            return self.led(a, update / gain)

        return change

    def led(self, a: Answer, update: Tensor) -> Answer:
        return a.led(a.cond + (a.scale - 1) * update)


@dataclass(frozen=True)
class MixedProjected(Projected):
    """APG with a `scale` of its own, after `first` steps of plain CFG, whose differences momentum knows."""

    name = "apg_mix"
    label = "APG mix"
    source = "diffusers' AdaptiveProjectedMixGuidance, of APG"
    aliases = ("adaptiveprojectedmix", "adaptiveprojectedmixguidance")
    first: int = option(6, 0, 1000)
    scale: float | None = option(None, 0.0, 100.0, float)

    def led(self, a: Answer, update: Tensor) -> Answer:
        if a.step < self.first:
            return a.by(CFG(a.scale))
        return super().led(a if self.scale is None else replace(a, scale=self.scale), update)


@dataclass(frozen=True)
class Magnitude(Part):
    """MAMBO-G: a scale that falls where the branches differ much, picture by picture.

    ``uncond + w (cond - uncond)``, ``w = 1 + (scale - 1) exp(-alpha |cond - uncond| / |uncond|)``.
    """

    name = "mambo"
    label = "MAMBO-G"
    source = "Zhu et al. 2025 (arXiv 2508.03442)"
    rank = Rank.COMBINES
    aliases = ("mambog", "magnitudeaware", "magnitudeawareguidance")
    alpha: float = option(8.0, 0.0, 100.0)

    def change(self, a: Answer) -> Answer:
        difference = a.cond - a.uncond
        ratio = (dot(difference, difference) / dot(a.uncond, a.uncond)).sqrt()
        scale = 1 + (a.scale - 1) * (-self.alpha * ratio).exp()
        return a.led(a.uncond + scale * difference)


@dataclass(frozen=True)
class PerpNeg(Part):
    """Perp-Neg: of the negative prompt only what is not said of the prompt too.

    ``empty + scale (d - weight (n - (<n, d> / |d|^2) d))``, where d and n are what "cond" and the negative
    prompt's "uncond" say beyond the branch "empty", of no words.
    """

    name = "perp_neg"
    label = "Perp-Neg"
    source = "Armandpour et al. 2023 (arXiv 2304.04968)"
    rank = Rank.COMBINES
    aliases = ("perpneg",)
    weight: float = option(1.0, 0.0, 100.0)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("uncond", "empty")

    def change(self, a: Answer) -> Answer:
        empty = a.outputs["empty"]
        wanted, unwanted = a.cond - empty, a.uncond - empty
        perpendicular = unwanted - along(unwanted, wanted)
        return a.led(empty + a.scale * (wanted - self.weight * perpendicular))
