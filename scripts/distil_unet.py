"""Make a student that draws in a few steps, without guidance, what a model draws with it.

python scripts/distil_unet.py --model weights/postcard --run_dir runs/student
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
    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.distil import DistilTask
    from ldm.pretrain.unet import prepare
    from ldm.runtime import Runtime

    torch.manual_seed(recipe.run.seed)
    parts = load_folder(args.model, Runtime(torch.device("cpu"), torch.float32))
    pictures = load_pictures(recipe.data)
    train, held_out = (prepare(each, parts.vae, parts.tokenizer, recipe.data.cache) for each in pictures)
    return DistilTask(parts, train, held_out, recipe.loss, recipe.model["prompts"])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("weights/postcard"), help="the teacher's folder")


if __name__ == "__main__":
    start(make_task, "configs/postcard_student.yaml", arguments)
