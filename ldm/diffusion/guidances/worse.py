"""Auto-guidance: away from what a worse model says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ldm.diffusion.guidances.part import Part, Rank, option

THINNED = "thinned"


@dataclass(frozen=True)
class AutoGuidance(Part):
    """``worse + scale (cond - worse)``: a worse model, told the same text, in the place of no text.

    model: a folder, file or hub name of one of the same kind, such as an earlier checkpoint; "thinned" is the
    model itself without its middle block. hash: of the other's weights, which is noted.
    """

    name = "autoguidance"
    label = "Auto-guidance"
    source = "Karras et al. 2024 (arXiv 2406.02507)"
    rank = Rank.PREPARES
    aliases = ("auto",)
    instead: ClassVar[Mapping[str, str]] = {"uncond": "cond:worse"}
    model: str = option(THINNED)
    hash: str | None = option(None, kind=str)
