"""Make a student that draws in a few steps, without guidance, what a model draws with it.

python scripts/distil_unet.py --model weights/postcard --run_dir runs/student
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.train.cli import start
from ldm.train.loop import Task
from ldm.train.recipe import Recipe


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.checkpoint import load_folder
    from ldm.runtime import Runtime
    from ldm.train.data import load_pictures
    from ldm.train.distil import DistilTask
    from ldm.train.unet import prepare

    torch.manual_seed(recipe.run.seed)
    parts = load_folder(args.model, Runtime(torch.device("cpu"), torch.float32))
    pictures = load_pictures(recipe.data)
    train, held_out = (prepare(each, parts.vae, parts.tokenizer, recipe.data.cache) for each in pictures)
    return DistilTask(parts, train, held_out, recipe.loss, recipe.model["prompts"])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("weights/postcard"), help="the teacher's folder")


if __name__ == "__main__":
    start(make_task, "configs/postcard_student.yaml", arguments)
