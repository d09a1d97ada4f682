"""Control pictures of a training: of a second folder, or made of what is shown by a preprocessor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.dataset.buckets import Crop, apply_crop
from ldm.dataset.picture import SUFFIX
from ldm.errors import UserError, abbreviate
from ldm.images.fitting import same_shape
from ldm.images.opening import open_picture
from ldm.images.pixels import to_pil
from ldm.preprocess import PREPROCESSORS, control_values, find, preprocess, read_options, source_of

if TYPE_CHECKING:
    from ldm.dataset.findings import Example


@dataclass(frozen=True)
class Controls:
    """Where the control picture of a picture comes from: by `preprocess`, or out of `files`."""

    preprocess: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[Path, Path] = field(default_factory=dict)  # a picture's file -> its control picture's

    def of(self, example: Example, crop: Crop, picture: Tensor) -> Tensor:
        """[3, H, W] in 0..1, of what `crop` shows: `picture` [3, H, W] in -1..1. Raises UserError."""
        if self.preprocess is not None:
            shown = source_of(to_pil(picture[None] / 2 + 0.5)[0])
            return torch.from_numpy(control_values(preprocess(shown, self.preprocess, **self.options)))
        return apply_crop(open_beside(self.files[example.path], example), crop) / 2 + 0.5

    @property
    def fingerprint(self) -> str:
        """Of what makes them, or of all control pictures' bytes: a run goes on with the same ones only."""
        if self.preprocess is not None:
            return ":".join(
                [self.preprocess, *(f"{name}={each}" for name, each in sorted(self.options.items()))]
            )
        return fingerprint(self.files)


def open_beside(
    path: Path, example: Example, convert: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """The picture that goes with an example's, in its size. Raises UserError if it has another shape."""
    image, (height, width) = open_picture(path, convert=convert), example.size
    if not same_shape((image.height, image.width), (height, width)):
        raise UserError(
            f"{path} is {image.width} x {image.height} pixels, but {example.path} {width} x {height}: "
            "give them one shape"
        )
    return image if image.size == (width, height) else image.resize((width, height))


def fingerprint(files: Mapping[Path, Path]) -> str:
    """Of how many files there are, and of their bytes, in the order of what they go with."""
    digest = hashlib.sha256()
    for picture in sorted(files):
        digest.update(files[picture].read_bytes())
    return f"{len(files)} {digest.hexdigest()[:12]}"


def made_by(name: str, options: Sequence[str]) -> Controls:
    """By a preprocessor, with options such as "low=50". Raises UserError where that is not possible."""
    found = find(name)
    if found.masked or found.needs_model:
        raise UserError(
            f"preprocess {name} needs more than the picture: train on a folder of control pictures"
        )
    if found.map:
        raise UserError(
            f"preprocess {name} needs a depth map: make them first, `ldm preprocess {found.name} ...`, and "
            "give their folder (--control-data-dir)"
        )
    given = read_options(found.name, dict(option.partition("=")[::2] for option in options))
    preprocess(np.zeros((8, 8, 3), np.uint8), found.name, **given)  # what is wrong is told at once
    return Controls(found.name, given)


def files_in(folder: Path, examples: Sequence[Example], root: Path) -> Controls:
    """The control picture of each example, found by its place below `root`, and its name.

    cats/7.jpg goes with cats/7.png, or with cats/7_canny.png as `ldm preprocess` names it. Raises UserError
    where one is missing.
    """
    endings = ("", *(f"_{name}" for name in PREPROCESSORS))
    return Controls(files=find_files(folder, examples, root, endings, "control_data_dir", "control picture"))


def find_files(
    folder: Path, examples: Sequence[Example], root: Path, endings: Sequence[str], key: str, what: str
) -> dict[Path, Path]:
    """The picture in `folder` for each example, by its place below `root` and its name with one of `endings`.

    Raises UserError where one is missing, or where `folder`, the value of `key`, is none.
    """
    if not folder.is_dir():
        raise UserError(f"{key} {folder} is no folder: give the one of {what}s")
    there = {
        path.relative_to(folder).with_suffix(""): path
        for path in sorted(folder.rglob("*"))
        if SUFFIX.fullmatch(path.suffix) and path.is_file()
    }
    files, missing = {}, []
    for example in examples:
        stem = example.path.relative_to(root).with_suffix("")
        found = (there.get(stem.with_name(stem.name + ending)) for ending in endings)
        if (path := next((each for each in found if each is not None), None)) is None:
            missing.append(str(example.path.relative_to(root)))
        else:
            files[example.path] = path
    if missing:
        raise UserError(f"{folder} has no {what} for {abbreviate(missing)}: give each one of its name")
    return files
