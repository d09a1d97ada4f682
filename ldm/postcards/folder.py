"""Postcards as a folder of pictures and captions, as `ldm finetune` reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.errors import UserError


def write_folder(folder: Path, count: int, make: Callable[[int], tuple[NDArray[np.uint8], str]]) -> None:
    """`count` pictures <number>.png, and beside each its caption as .txt; `make` gives both of a number.

    Raises UserError for a folder that holds something.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(count - 1)))
    for k in range(count):
        picture, caption = make(k)
        Image.fromarray(picture).save(folder / f"{k:0{digits}d}.png")
        (folder / f"{k:0{digits}d}.txt").write_text(caption + "\n", encoding="utf-8")
