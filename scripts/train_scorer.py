"""Train the scorer: `python scripts/train_scorer.py --run_dir runs/scorer`, then copy runs/scorer/export."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.train.cli import start
from ldm.train.loop import Task
from ldm.train.recipe import Recipe


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.evaluate.agreement import names
    from ldm.evaluate.fit import ScorerTask
    from ldm.evaluate.scorer import Scorer

    torch.manual_seed(recipe.run.seed)
    return ScorerTask(Scorer(names()), recipe.data.held_out, recipe.loss)


if __name__ == "__main__":
    start(make_task, "configs/postcard_scorer.yaml", lambda parser: None)
