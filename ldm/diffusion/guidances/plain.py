"""Classifier-free guidance itself, its rescaling and its limits, as parts of a chain."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.diffusion.guidance import CFG, CFGPlusPlus, rescale_to
from ldm.diffusion.guidances.part import Answer, Part, Rank, option


@dataclass(frozen=True)
class PlainCFG(Part):
    """``uncond + scale (cond - uncond)``, as `ldm.diffusion.guidance.CFG`."""

    name = "cfg"
    label = "CFG"
    source = "Ho and Salimans 2022 (arXiv 2207.12598), equation 6"
    rank = Rank.COMBINES
    aliases = ("classifierfree", "classifierfreeguidance")

    def change(self, a: Answer) -> Answer:
        return a.led(CFG(a.scale).combined(lambda _: a.outputs))


@dataclass(frozen=True)
class PlusPlus(Part):
    """``uncond + strength (cond - uncond)``, and solvers step along the noise of "uncond".

    `ldm.diffusion.guidance.CFGPlusPlus`, for any sampler; those with "CFG++" in their names have it already.
    """

    name = "cfgpp"
    label = "CFG++"
    source = "Chung et al. 2024 (arXiv 2406.08070), algorithm 2"
    rank = Rank.COMBINES
    strength: float = option(0.6, 0.0, 100.0)

    def change(self, a: Answer) -> Answer:
        return a.led(CFGPlusPlus(self.strength).combined(lambda _: a.outputs), a.uncond)


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
