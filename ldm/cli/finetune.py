"""`ldm finetune`: a model trained on a folder of pictures; `ldm train-control`: a ControlNet beside one;
`ldm train-image-prompt`: an IP-Adapter."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.finetune.recipe import Mode

CONTROL: Mode = "controlnet"
IMAGE_PROMPT: Mode = "image_prompt"


def add_flags(parser: argparse.ArgumentParser, mode: Mode | None = None) -> None:
    from ldm.finetune.flags import add_recipe_flags

    add_recipe_flags(parser, mode)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_control_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, CONTROL)


def add_image_prompt_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, IMAGE_PROMPT)


def finetune(args: argparse.Namespace, mode: Mode | None = None, precompute: bool = False) -> int:
    """Fine-tune; the same command again goes on where it stopped."""
    from ldm.finetune.flags import read_finetune_recipe

    recipe = read_finetune_recipe(args, mode)
    try:
        from ldm.finetune.finetune import finetune

        finetune(recipe, precompute)
    except ModuleNotFoundError as error:
        raise UserError(f"training needs {error.name}: pip install 'ldm[train]'") from None
    return 0


def precompute(args: argparse.Namespace) -> int:
    """Make what a fine-tuning of these flags would keep in its cache, and end."""
    return finetune(args, precompute=True)


def train_control(args: argparse.Namespace) -> int:
    """Train a ControlNet, in the same way."""
    return finetune(args, CONTROL)


def train_image_prompt(args: argparse.Namespace) -> int:
    """Train an IP-Adapter, in the same way."""
    return finetune(args, IMAGE_PROMPT)
