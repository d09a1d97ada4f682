"""Classifier-free guidance itself, its rescaling and its limits, as parts of a chain."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.diffusion.guidance import CFGPlusPlus, rescale_to
from ldm.diffusion.guidances.part import Answer, Part, Rank, option


@dataclass(frozen=True)
class PlainCFG(Part):
    """``uncond + scale (cond - uncond)``, `ldm.diffusion.guidance.CFG`: also what a chain does without it."""

    name = "cfg"
    label = "CFG"
    source = "Ho and Salimans 2022 (arXiv 2207.12598), equation 6"
    rank = Rank.COMBINES
    aliases = ("classifierfree", "classifierfreeguidance")

    @property
    def reads(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class PlusPlus(Part):
    """``uncond + strength (cond - uncond)``, and solvers step along the noise of "uncond".

    `ldm.diffusion.guidance.CFGPlusPlus`, for any sampler; those with "CFG++" in their names have it already.
    Without a strength, that of `cfg_pp_strength`.
    """

    name = "cfgpp"
    label = "CFG++"
    source = "Chung et al. 2024 (arXiv 2406.08070), algorithm 2"
    rank = Rank.COMBINES
    strength: float | None = option(None, 0.0, 100.0, float)

    def change(self, a: Answer) -> Answer:
        return a.by(CFGPlusPlus(self.strength or 1.0))


@dataclass(frozen=True)
class Rescale(Part):
    """The standard deviation of what is guided, brought `phi` of the way back to that of "cond"."""

    name = "cfg_rescale"
    label = "CFG rescale"
    source = "Lin et al. 2023 (arXiv 2305.08891), section 3.4"
    rank = Rank.FINISHES
    aliases = ("rescale", "rescalecfg")
    phi: float = option(0.7, 0.0, 1.0)

    def change(self, a: Answer) -> Answer:
        return a if a.guided is a.cond else a.led(rescale_to(a.guided, a.cond, self.phi))


@dataclass(frozen=True)
class Interval(Part):
    """All of the chain between two shares of the timesteps alone, as `ldm.diffusion.guidance.Limited`."""

    name = "interval"
    label = "Interval"
    source = "Kynkaanniemi et al. 2024 (arXiv 2404.07724), equation 5"
    rank = Rank.LIMITS
    aliases = ("guidanceinterval", "limitedinterval")
    start: float = option(0.0, 0.0, 1.0)
    stop: float = option(1.0, 0.0, 1.0)
