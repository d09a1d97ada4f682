"""A folder of pictures that is measured: which of them count, their captions, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.dataset.examine import examine
from ldm.dataset.findings import Examined, Example, Finding
from ldm.errors import UserError, abbreviate, printable
from ldm.images.opening import open_picture
from ldm.images.png import read_fields

OnProgress = Callable[[int, int], None]  # done, in all
CONVERSION = "RGB of 8 bits, upright by EXIF, transparent parts on white, first frame"


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder, sorted by path: figures do not depend on the order of the disk.

    captions: None where there is none. left_out: why, for each file or row that is not measured.
    converted: how many pictures have which oddity (alpha, CMYK, ...).
    """

    folder: Path
    paths: tuple[Path, ...]
    captions: tuple[str | None, ...]
    digests: tuple[str, ...]  # SHA-256 of the files' bytes
    sizes: tuple[tuple[int, int], ...]  # (height, width)
    left_out: tuple[str, ...]
    converted: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.paths)

    def names(self) -> list[str]:
        """Paths within the folder."""
        return [path.relative_to(self.folder).as_posix() for path in self.paths]

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """All pictures as RGB, some at a time. Raises UserError for one that has gone."""
        for start in range(0, len(self), size):
            yield [open_picture(path) for path in self.paths[start : start + size]]

    def protocol(self) -> dict[str, object]:
        """What of them decides the figures."""
        sizes = Counter(f"{width}x{height}" for height, width in self.sizes)
        return {
            "folder": str(self.folder),
            "count": len(self),
            "sizes": dict(sizes.most_common(5)) | ({"others": len(sizes) - 5} if len(sizes) > 5 else {}),
            "conversion": CONVERSION,
            "converted": dict(self.converted),
            "left_out": list(self.left_out),
        }


def read_pictures(folder: Path, on_progress: OnProgress | None = None) -> Pictures:
    """Examine a folder. Captions as `ldm folder` finds them, else what a picture says it was drawn from.

    What cannot be read, and copies of the same bytes with the same caption, are left out.

    Raises:
        UserError: if there is no folder, no picture in it, or a table of captions is broken.
    """
    examined = examine(folder, missing_caption="empty", on_progress=on_progress)
    _check(examined)
    examples = sorted(examined.examples, key=lambda example: example.path)
    fixed = [found for found in examined.findings if found.effect == "fixed" and "caption" not in found.kind]
    return Pictures(
        examined.folder,
        tuple(example.path for example in examples),
        tuple(_caption(example) for example in examples),
        tuple(example.digest for example in examples),
        tuple(example.size for example in examples),
        tuple(_line(found) for found in examined.findings if found.effect == "skipped"),
        tuple(Counter(found.kind for found in fixed).items()),
    )


def check_apart(pictures: Pictures, reference: Pictures) -> list[str]:
    """Notes where the two sets share pictures. Raises UserError where one is the other, or holds one only."""
    if pictures.folder.resolve() == reference.folder.resolve():
        raise UserError(f"--reference {reference.folder} is the folder that is measured: give another one")
    for each in (pictures, reference):
        if len(each) < 2:
            raise UserError(f"{each.folder} holds 1 picture: distances between sets need 2 or more")
    shared = set(pictures.digests) & set(reference.digests)
    if len(shared) == len(set(pictures.digests)):
        raise UserError(
            f"every picture of {pictures.folder} lies in {reference.folder} too: there is nothing to compare"
        )
    return [f"{len(shared)} of the pictures lie in both folders"] if shared else []


def _check(examined: Examined) -> None:
    stops = [found for found in examined.findings if found.effect == "stops"]
    if broken := [found for found in stops if found.kind != "no pictures"]:
        raise UserError(_line(broken[0]))
    if stops:
        lines = [_line(found) for found in examined.findings if found.effect == "skipped"]
        why = f": {abbreviate(lines, 1)}" if lines else ""
        raise UserError(f"{examined.folder} holds no picture that can be read{why}")


def _line(found: Finding) -> str:
    return printable(found.text if found.path is None else f"{found.path}: {found.text}")


def _caption(example: Example) -> str | None:
    """The folder's caption, else the prompt in the picture itself."""
    if example.caption:
        return example.caption
    try:
        prompt = dict(read_fields(example.path)).get("prompt")
    except UserError:
        return None
    return prompt if isinstance(prompt, str) and prompt else None
