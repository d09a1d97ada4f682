"""Blocks of a model by name, for learning rates and ranks of their own.

    down.0, down.1, ...   levels of the U-Net's way down      down   all of them
    mid                   its middle
    up.0, up.1, ...       levels of its way up, from the narrowest one
    text_encoder, text_encoder_2

No torch here: names are read with the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import nn

NAME = re.compile(r"(down|up)(\.\d+)?|mid|text_encoder(_2)?")
LEVEL = re.compile(r"(down|up)_blocks(\.\d+)?|mid_block")
FOLDERS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}  # diffusers' names


def read_blocks(given: Iterable[str]) -> dict[str, float]:
    """Of `down.0=1e-4`, by block. Raises ValueError."""
    made: dict[str, float] = {}
    for each in given:
        name, _, value = each.partition("=")
        if not NAME.fullmatch(name) or name in made:
            raise ValueError(f"{each}: write down.0=..., mid=..., up.2=... or text_encoder=..., each once")
        try:
            made[name] = float(value)
        except ValueError:
            raise ValueError(f"{each}: {value} is no number") from None
        if not 0 <= made[name] < float("inf"):
            raise ValueError(f"{each}: give 0 or more")
    return made


def prefix(block: str) -> str:
    """What the paths of a block's modules in the U-Net begin with."""
    name, _, level = block.partition(".")
    return f"{FOLDERS[name]}.{level}." if level else f"{FOLDERS[name]}."


def block_of(path: str, blocks: Collection[str]) -> str | None:
    """The one of `blocks` that a path in the U-Net lies in; of down and down.0 the latter."""
    fit = [each for each in blocks if each.partition(".")[0] in FOLDERS and path.startswith(prefix(each))]
    return max(fit, key=len, default=None)


def check_blocks(key: str, blocks: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
    """Raise UserError, naming the option `key`, for a block that no trained module has."""
    levels = [path for path, _ in modules["unet"].named_modules() if LEVEL.fullmatch(path)]
    there = {path.replace("_blocks", "").replace("_block", "") for path in levels}
    there |= modules.keys() - {"unet"}
    for block in blocks:
        if block not in there:
            raise UserError(f"{key}: {block} is not trained: there are {', '.join(sorted(there))}")
