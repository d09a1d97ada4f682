"""Train what prompt following is measured with: the scorer of postcards, or the detector of sprites.

python scripts/train_scorer.py --run_dir runs/scorer [--config configs/sprites_scorer.yaml]
Then copy runs/scorer/export to weights/postcard-eval, or to weights/sprites-eval.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.pretrain.command import start
from ldm.pretrain.recipe import Recipe
from ldm.train.task import Task


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    torch.manual_seed(recipe.run.seed)
    if recipe.data.sprites is None:
        from ldm.postcards.scoring.agreement import names
        from ldm.postcards.scoring.fit import ScorerTask
        from ldm.postcards.scoring.scorer import Scorer

        return ScorerTask(Scorer(names()), recipe.data.held_out, recipe.loss)
    from ldm.postcards.scoring.detector import Detector, DetectorConfig
    from ldm.postcards.scoring.detector_fit import DetectorTask
    from ldm.postcards.scoring.names import sprite_names
    from ldm.postcards.sprites.scene import make_world

    seen = make_world(recipe.data.sprites.things, recipe.data.sprites.styles)
    detector = Detector(DetectorConfig(**vars(sprite_names(seen))))
    return DetectorTask(detector, seen, recipe.data.held_out, recipe.loss)


if __name__ == "__main__":
    start(make_task, "configs/postcard_scorer.yaml", lambda parser: None)
