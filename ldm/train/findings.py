"""What examining a folder of pictures gives: the examples to train on, and what was found on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Effect = Literal["stops", "skipped", "fixed", "note"]
EFFECTS: tuple[Effect, ...] = ("stops", "skipped", "fixed", "note")


@dataclass(frozen=True)
class Example:
    """One picture to train on."""

    path: Path
    caption: str | None  # None: there is none, and training cannot start
    size: tuple[int, int]  # (height, width) in pixels, upright
    digest: str  # SHA-256 of the file's bytes, hex
    repeats: int = 1  # times an epoch: kohya's 10_name folders


@dataclass(frozen=True)
class Finding:
    """One thing worth telling. `text` says what is wrong and what will happen.

    effect: "stops" training; the file or row is "skipped"; it is "fixed" when it is loaded; or just a "note".
    """

    path: Path | None
    kind: str  # the same words for the same thing, to group and count by
    text: str
    effect: Effect


@dataclass(frozen=True)
class Examined:
    """A folder, examined. `findings` are sorted by effect, kind and path."""

    folder: Path
    layout: str  # where the captions come from, e.g. "20 from .txt files"
    examples: tuple[Example, ...]
    findings: tuple[Finding, ...]

    @property
    def can_train(self) -> bool:
        """Whether nothing stops the run."""
        return all(finding.effect != "stops" for finding in self.findings)
