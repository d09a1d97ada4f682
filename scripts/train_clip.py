"""Train the text encoder: `python scripts/train_clip.py --run_dir runs/clip`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.pretrain.command import start
from ldm.pretrain.recipe import Recipe
from ldm.train.task import Task


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch
    from filelock import FileLock

    from ldm.files import whole_folder
    from ldm.pretrain.clip import CLIPTask
    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.vocabulary import train_vocabulary

    pictures, held_out = load_pictures(recipe.data)
    model = dict(recipe.model)
    tokenizer = args.run_dir / "tokenizer"
    captions = [caption for each in pictures.captions for caption in each]
    args.run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(args.run_dir / ".tokenizer.lock"):  # of several processes one learns it
        if not tokenizer.exists():
            with whole_folder(tokenizer) as aside:
                train_vocabulary(captions, model["merges"], model["length"], aside)
    torch.manual_seed(recipe.run.seed)
    return CLIPTask(model, tokenizer, pictures, held_out, recipe.loss)


if __name__ == "__main__":
    start(make_task, "configs/postcard_clip.yaml", lambda parser: None)
