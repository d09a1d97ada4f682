"""What the trainers' commands share: arguments, recipe, run folder, errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ldm.errors import reported
from ldm.pretrain.recipe import Recipe, load_recipe
from ldm.train.loop import train
from ldm.train.task import Task

MakeTask = Callable[[Recipe, argparse.Namespace], Task]


def start(make_task: MakeTask, recipe: str, add_arguments: Callable[[argparse.ArgumentParser], None]) -> None:
    """Parse the command line, read the recipe, train. The same command again resumes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, default=Path(recipe), help=f"a recipe (default: {recipe})")
    parser.add_argument("--run_dir", type=Path, required=True, help="state, log, grids and weights go here")
    parser.add_argument(
        "--train_data_dir", type=Path, help="a folder of images instead of rendered postcards"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. run.max_minutes=20"
    )
    parser.add_argument("--force", action="store_true", help="go on where the run's folder speaks against it")
    add_arguments(parser)
    args = parser.parse_args()
    if args.force:
        args.set.append("run.force=true")
    if args.train_data_dir:
        args.set.append(f"data.folder={args.train_data_dir}")
    with reported(training=True):
        chosen = load_recipe(args.config, args.set)
        train(make_task(chosen, args), chosen, args.run_dir)
