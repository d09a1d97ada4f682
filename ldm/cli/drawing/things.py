"""`txt2img --list-things`: what a small model can draw."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from ldm.errors import UserError, printable

EMBEDDED = "postcard"
WIDTH = 100


def list_things(args: argparse.Namespace) -> int:
    """Print what a model says that it can draw. Nothing is loaded. Raises UserError where it says nothing."""
    from ldm.prompts.world import TABLE, read_world

    folder = find(args.model)
    world = read_world(folder / TABLE)
    if world is None:
        raise UserError(f"{args.model or EMBEDDED} does not say what it can draw: it has no {TABLE}")
    for line in world.lines():
        print(textwrap.fill(printable(line), WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return 0


def find(model: str | None) -> Path:
    """The folder of a model, which may be a name on the hub. Raises UserError."""
    from ldm.files import weights_folder

    if model is None or (model == EMBEDDED and not Path(model).exists()):
        return weights_folder(EMBEDDED)
    if Path(model).is_dir():
        return Path(model)
    from ldm.checkpoint.source import find as find_anywhere  # which needs torch

    return find_anywhere(model)
