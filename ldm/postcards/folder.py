"""Postcards as a folder of pictures and captions, as `ldm finetune` reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.errors import UserError

Picture = tuple[NDArray[np.uint8], str] | tuple[NDArray[np.uint8], str, NDArray[np.bool_]]


def write_folder(folder: Path, count: int, make: Callable[[int], Picture]) -> None:
    """`count` pictures <number>.png, and beside each its caption as .txt; `make` gives both of a number.

    Where it gives what counts of the picture too, that is <number>.mask.png.

    Raises UserError for a folder that holds something.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(count - 1)))
    for k in range(count):
        picture, caption, *mask = make(k)
        Image.fromarray(picture).save(folder / f"{k:0{digits}d}.png")
        (folder / f"{k:0{digits}d}.txt").write_text(caption + "\n", encoding="utf-8")
        for each in mask:
            Image.fromarray(each).save(folder / f"{k:0{digits}d}.mask.png")
