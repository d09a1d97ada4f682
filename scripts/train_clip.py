"""Train the text encoder: `python scripts/train_clip.py --run_dir runs/clip`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.train.cli import start
from ldm.train.loop import Task
from ldm.train.recipe import Recipe


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.train.clip import CLIPTask
    from ldm.train.data import load_pictures
    from ldm.train.vocabulary import known_words, train_vocabulary

    pictures, held_out = load_pictures(recipe.data)
    model = dict(recipe.model)
    tokenizer, export = args.run_dir / "tokenizer", args.run_dir / "export"
    captions = [caption for each in pictures.captions for caption in each]
    if not (tokenizer / "vocab.json").exists():
        train_vocabulary(captions, model["merges"], model["length"], tokenizer)
    export.mkdir(parents=True, exist_ok=True)
    (export / "words.txt").write_text("\n".join(known_words(captions)) + "\n")
    torch.manual_seed(recipe.run.seed)
    return CLIPTask(model, tokenizer, pictures, held_out, recipe.loss)


if __name__ == "__main__":
    start(make_task, "configs/postcard_clip.yaml", lambda parser: None)
