"""Train a classifier of a model's noisy latents, for classifier guidance.

python scripts/train_classifier.py --model weights/postcard --run_dir runs/classifier
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

    from ldm.checkpoint import load_folder
    from ldm.diffusion.schedule import Schedule
    from ldm.models import LatentClassifier
    from ldm.models.classifier import fingerprint
    from ldm.postcards.vocabulary import KINDS
    from ldm.pretrain.classifier import ClassifierTask, kinds_of
    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.unet import prepare
    from ldm.runtime import Runtime

    torch.manual_seed(recipe.run.seed)
    parts = load_folder(args.model, Runtime(torch.device("cpu"), torch.float32))
    known = {"classes": KINDS, "in_channels": parts.vae.latent_channels, "vae": fingerprint(parts.vae)}
    classifier = LatentClassifier.from_config(recipe.model | known)
    pictures = load_pictures(recipe.data)
    classes = [kinds_of(each) for each in pictures]
    data = [prepare(each, parts.vae, parts.tokenizer, recipe.data.cache) for each in pictures]
    train, held_out = ((each.latents, own) for each, own in zip(data, classes, strict=True))
    return ClassifierTask(classifier, Schedule.from_config(dict(parts.scheduler)), train, held_out)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("weights/postcard"), help="whose latents")


if __name__ == "__main__":
    start(make_task, "configs/postcard_classifier.yaml", arguments)
