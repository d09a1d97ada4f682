"""Train the scorer: `python scripts/train_scorer.py --run_dir runs/scorer`, then copy runs/scorer/export."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.pretrain.command import start
from ldm.pretrain.recipe import Recipe
from ldm.train.task import Task


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.postcards.scoring.agreement import names
    from ldm.postcards.scoring.fit import ScorerTask
    from ldm.postcards.scoring.scorer import Scorer

    torch.manual_seed(recipe.run.seed)
    return ScorerTask(Scorer(names()), recipe.data.held_out, recipe.loss)


if __name__ == "__main__":
    start(make_task, "configs/postcard_scorer.yaml", lambda parser: None)
