"""What prepares pictures for CLIP's image tower: transformers' own, by the folder's file or as CLIP's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILES = ("preprocessor_config.json", "processor_config.json")


def has_processor(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def clip_processor(folders: Iterable[Path], side: int) -> Any:
    """A CLIPImageProcessorPil by the first of the folders that has a file for it, else CLIP's at that side.

    Pillow's resizing, so that figures do not depend on whether torchvision is installed.
    """
    from transformers import CLIPImageProcessorPil

    for folder in folders:
        if has_processor(folder):
            return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
