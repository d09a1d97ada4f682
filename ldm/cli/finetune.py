"""`ldm finetune`: a model trained on a folder of pictures."""

from __future__ import annotations

import argparse

from ldm.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    from ldm.finetune.recipe import add_recipe_flags

    add_recipe_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def finetune(args: argparse.Namespace) -> int:
    """Fine-tune; the same command again goes on where it stopped."""
    from ldm.finetune.recipe import read_finetune_recipe

    recipe = read_finetune_recipe(args)
    try:
        from ldm.finetune.finetune import finetune

        finetune(recipe)
    except ModuleNotFoundError as error:
        raise UserError(f"training needs {error.name}: pip install 'ldm[train]'") from None
    return 0
