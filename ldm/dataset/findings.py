"""What examining a folder of pictures gives: the examples to train on, and what was found on the way."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ldm.dataset.shards import Place
from ldm.errors import UserError, printable
from ldm.images.opening import open_picture

Effect = Literal["stops", "skipped", "fixed", "note"]
EFFECTS: tuple[Effect, ...] = ("stops", "skipped", "fixed", "note")
TITLES: dict[Effect, str] = {
    "stops": "stops training",
    "skipped": "skipped",
    "fixed": "fixed when loaded",
    "note": "worth knowing",
}


@dataclass(frozen=True)
class Example:
    """One picture to train on."""

    path: Path
    caption: str | None  # None: there is none, and training cannot start
    size: tuple[int, int]  # (height, width) in pixels, upright
    digest: str  # SHA-256 of the file's bytes, hex
    repeats: int = 1  # times an epoch: kohya's 10_name folders
    place: Place | None = None  # where its bytes are, if it has no file of its own

    def open(self) -> Image.Image:
        """The picture, upright RGB. Raises UserError where it cannot be read, or is not what was examined."""
        if self.place is None:
            return open_picture(self.path)
        data = self.place.read()
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise UserError(f"{self.path} has changed since it was examined: run the same command again")
        return open_picture(self.path, io.BytesIO(data))


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


# --- told ------------------------------------------------------------------------------------------------


def report(examined: Examined, shown: int | None = None) -> Iterator[str]:
    """Lines, grouped by effect and kind; at most `shown` of each kind."""
    examples, found = examined.examples, examined.findings
    yield f"{examined.folder}: {_count(len(examples), 'picture')} to train on"
    yield f"captions: {examined.layout}"
    for effect, of_effect in groupby(found, lambda finding: finding.effect):
        yield f"\n{TITLES[effect]}"
        for kind, group in groupby(of_effect, lambda finding: finding.kind):
            lines = list(group)
            yield f"  {kind} ({len(lines)})"
            for finding in lines[:shown]:
                yield f"    {_line(finding, examined)}"
            if shown is not None and len(lines) > shown:
                yield f"    and {len(lines) - shown} more (--all shows them)"
    counts = Counter(finding.effect for finding in found)
    yield ""
    yield (
        ", ".join(f"{counts[effect]} {TITLES[effect]}" for effect in EFFECTS if counts[effect]) or "no faults"
    )
    if examined.can_train:
        shows = sum(example.repeats for example in examples)
        yield f"training could start: {_count(shows, 'picture')} in each epoch"
    else:
        yield "training could not start: mend what stops it"


def as_json(examined: Examined) -> dict[str, Any]:
    """Everything, in what JSON can hold; paths as they were given."""
    return {
        "folder": str(examined.folder),
        "layout": examined.layout,
        "can_train": examined.can_train,
        "examples": [
            {name: value for name, value in vars(example).items() if name != "place"}
            | {"path": str(example.path)}
            for example in examined.examples
        ],
        "findings": [
            {**vars(finding), "path": finding.path and str(finding.path)} for finding in examined.findings
        ],
    }


def _line(finding: Finding, examined: Examined) -> str:
    """`name: text` in one line, whatever characters a name holds."""
    path, text = finding.path, finding.text
    if path is not None:
        path = path.relative_to(examined.folder) if path.is_relative_to(examined.folder) else path
        text = f"{path}: {text}"
    return printable(text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
